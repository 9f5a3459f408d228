"""Training loaders that go on where a checkpoint left them: the same shuffles, no sample twice, none left out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_megatron.checkpoint import progress, rng
from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.checkpoint.progress import Position

Record = dict[str, Any]


class Resumption:
    """The loaders of one run; and, after a load, where they have to go on."""

    def __init__(self) -> None:
        self.loaders: list[_Batches] = []
        self._saved: Record | None = None
        self._mid_window: rng.States | None = None
        self._keeps_its_place = False

    def watch(self, loader: Any) -> Any:
        """Have a training loader take part; one that has ``state_dict`` keeps its own place."""
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            self._keeps_its_place = True
            return loader if sized_len(loader) is not None else _OneAhead(loader)
        if not isinstance(loader, DataLoader):
            return loader
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        inner = getattr(loader, name)
        if inner is None:
            return loader
        if not isinstance(inner, _Batches):
            # A copy, since the user's may be read elsewhere too. DataLoader refuses to have its samplers assigned;
            # nothing else in it holds on to them.
            loader = copy.copy(loader)
            loader.__dict__[name] = inner = _Batches(inner, loader)
        self.loaders.append(inner)
        inner.resume = self._saved_for(len(self.loaders) - 1)
        return loader

    def note_window(self, trainer: pl.Trainer) -> None:
        """Remember the random states at an accumulation window's first batch: its batches may have to run again."""
        count = trainer.accumulate_grad_batches
        if count > 1 and progress.processed(trainer) % count == 0:
            self._mid_window = rng.snapshot()

    def record(self, where: Position, data_parallel_size: int) -> Record:
        """What a checkpoint keeps of this rank's loaders and random states.

        Raises:
            CheckpointError: The window's batches would have to be read again, by a loader that cannot go back.
        """
        if where.redo and self._keeps_its_place:
            raise CheckpointError(
                f"A checkpoint {where.redo} batches into an accumulation window has to read them again, and this"
                " loader has a state_dict of its own and cannot go back. Save between windows: every_n_train_steps"
                " counts them, time and exceptions do not."
            )
        return {
            "epoch": where.epoch,
            "batches": where.batches,
            "replicas": data_parallel_size,
            "rng": self._mid_window if where.redo and self._mid_window is not None else rng.snapshot(),
            "loaders": [batches.record() for batches in self.loaders],
        }

    def load(self, record: Record) -> None:
        """Go on as a ``record`` says, from the next iteration of each loader on."""
        self._saved = record
        for number, batches in enumerate(self.loaders):  # made early: `estimated_stepping_batches` was asked
            batches.resume = self._saved_for(number)

    def forget(self) -> None:
        """Take the weights that were loaded, and nothing else."""
        self._saved = None

    def begin(self, trainer: pl.Trainer, data_parallel_size: int, same_layout: bool) -> None:
        """Bring loaders and random states to the saved place, just before the first step.

        Args:
            trainer: About to train.
            data_parallel_size: Replicas of this run.
            same_layout: Whether this rank sits where the rank sat whose states were saved.
        """
        saved, self._saved = self._saved, None
        if saved is None:
            return
        # Lightning says so of every loader without `state_dict`; this one goes on where it was.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        if any(batches.resume is not None and not batches.resume.begun for batches in self.loaders):
            trainer.fit_loop._load_combined_loader_states()  # private, as `_drop`
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if saved["batches"]:
            batches = self._batches_now(saved, data_parallel_size)
            if batches != progress.processed(trainer):
                progress.set_batches(trainer, batches)
            if self.loaders and not self._skips_by_index:
                _drop(trainer, batches)
        if same_layout:
            rng.restore(saved["rng"])
        else:
            rng.set_data_states(saved["rng"]["data"])

    @property
    def _skips_by_index(self) -> bool:
        return len(self.loaders) == 1 and self.loaders[0].is_indexed

    def _saved_for(self, number: int) -> _Resume | None:
        if self._saved is None or number >= len(self._saved["loaders"]):
            return None
        return _Resume(self._saved, self._saved["loaders"][number], number == 0)

    def _batches_now(self, saved: Record, replicas: int) -> int:
        if not self.loaders or replicas == saved["replicas"]:
            rows = saved["loaders"][0]["rows"] if saved["loaders"] else None
            if not self.loaders or rows is None or rows == self.loaders[0].rows:
                return int(saved["batches"])
        return batches_now(saved, self.loaders[0].rows, replicas)


def batches_now(saved: Record, rows: int | None, replicas: int) -> int:
    """Batches of ``rows`` on each of ``replicas`` that are the samples which were consumed.

    Raises:
        MisconfigurationException: They are no whole number, or not known.
    """
    if saved["loaders"] and saved["loaders"][0].get("global_batches"):
        return int(saved["batches"])
    before = saved["loaders"][0]["rows"] if saved["loaders"] else None
    if before is None or rows is None:
        raise MisconfigurationException(
            f"The checkpoint is from the middle of an epoch on {saved['replicas']} data-parallel replicas, and this run"
            f" has {replicas}; the loader does not tell its batch_size, so the samples it has given are not known."
            " Resume with as many replicas, or from a checkpoint at an epoch's end."
        )
    samples = saved["batches"] * before * saved["replicas"]
    if samples % (rows * replicas):
        fits = [n for n in range(1, samples // replicas + 1) if samples % (n * replicas) == 0]
        raise MisconfigurationException(
            f"The checkpoint has consumed {samples} samples of its epoch ({saved['batches']} batches of {before} on"
            f" {saved['replicas']} replicas), which is no whole number of batches of {rows} on {replicas} replicas."
            f" Use batch_size={before * saved['replicas'] // replicas or 1}"
            f"{' or ' + ', '.join(map(str, fits[-3:])) if fits else ''}, or a checkpoint at an epoch's end."
        )
    return samples // (rows * replicas)


class _Resume:
    """Where one loader goes on.

    Args:
        saved: The record of the rank.
        loader: The record of the loader.
        first: Whether it is the first loader, whose batches are counted.
    """

    def __init__(self, saved: Record, loader: Record, first: bool) -> None:
        self.saved, self.loader, self.first = saved, loader, first
        self.begun = False  # an iterator was made, if none of its batches asked for

    def skip(self, rows: int | None) -> int:
        """Batches to leave out, once the layout is known."""
        from lightning_megatron import groups

        replicas = torch.distributed.get_world_size(groups.data_parallel())
        if replicas == self.saved["replicas"] and rows == self.loader["rows"]:
            return int(self.saved["batches"])
        return batches_now(self.saved, rows, replicas) if self.saved["batches"] else 0


class _Batches:
    """Stands in for a loader's batch sampler: remembers the random states that its order came from."""

    def __init__(self, inner: Any, loader: DataLoader) -> None:
        self.inner = inner
        self.is_indexed = not isinstance(loader.dataset, IterableDataset)
        self.rows = loader.batch_size
        self.resume: _Resume | None = None
        self._has_workers = loader.num_workers > 0
        self._untouched = False  # the last iterator has not been asked for a batch
        self._generators = [
            g for g in (loader.generator, getattr(getattr(inner, "sampler", inner), "generator", None)) if g is not None
        ]
        self._at_iter: Record | None = None
        self._at_first: Record | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        # With workers an iterator is made twice; torch draws their seed after the first time.
        again = self._has_workers and self._untouched
        self._untouched = True
        resume = self.resume
        if resume is not None:
            _set_order(self.inner, resume.loader["seed"], resume.saved["epoch"])
            if resume.saved["batches"]:
                if not again:
                    self._restore(resume.loader["at_iter"])
                resume.begun = True
                return self._go_on(resume)
            self.resume = None
        if not again:
            self._at_iter = self._states()
        return self._begin()

    def record(self) -> Record:
        """What a checkpoint keeps."""
        seed = getattr(getattr(self.inner, "sampler", self.inner), "seed", None)
        seed = seed if isinstance(seed, int) else None
        # Of a sampler whose global batches are the same on any number of replicas.
        whole = bool(getattr(self.inner, "global_batches", False))
        place = {"at_iter": self._at_iter, "at_first": self._at_first}
        return {"rows": self.rows, "seed": seed, "global_batches": whole, **place}

    def _begin(self) -> Iterator[Any]:
        self._untouched = False
        self._at_first = self._states()
        yield from self.inner

    def _go_on(self, resume: _Resume) -> Iterator[Any]:
        """The rest of the epoch in the order in which it was begun."""
        self.resume, self._untouched = None, False
        self._at_iter, self._at_first = resume.loader["at_iter"], resume.loader["at_first"]
        now = self._states()
        self._restore(self._at_first)
        batches = iter(self.inner)
        skipped = resume.skip(self.rows) if self.is_indexed and resume.first else 0
        for _ in range(skipped):
            next(batches, None)
        if skipped:
            rng.set_data_states(now["rng"])  # generators of the loader's own go on from here
        yield from batches

    def _states(self) -> Record:
        return {"rng": rng.data_states(), "generators": [g.get_state() for g in self._generators]}

    def _restore(self, states: Record | None) -> None:
        if states is not None:
            rng.set_data_states(states["rng"])
            for generator, state in zip(self._generators, states["generators"], strict=False):
                generator.set_state(state)


class _OneAhead:
    """A loader with a state but no length, of which Lightning reads one batch ahead: its state before that batch."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._before: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        nothing = object()
        while True:
            self._before = copy.deepcopy(self.loader.state_dict())
            batch = next(batches, nothing)
            if batch is nothing:
                return
            yield batch

    def state_dict(self) -> Any:
        return self.loader.state_dict() if self._before is None else self._before

    def load_state_dict(self, state: Any) -> None:
        self.loader.load_state_dict(state)


def _set_order(inner: Any, seed: int | None, epoch: int) -> None:
    """What a distributed sampler's order comes from; Lightning sets the epoch after the first iterator is made."""
    for sampler in (inner, getattr(inner, "sampler", None)):
        if seed is not None and isinstance(getattr(sampler, "seed", None), int):
            sampler.seed = seed  # type: ignore[union-attr]
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def _drop(trainer: pl.Trainer, batches: int) -> None:
    """Read and forget batches: what has no numbers cannot be skipped by them."""
    fetcher = trainer.fit_loop._data_fetcher  # private (Lightning 2.6): the loop's iterator is made before any hook
    if fetcher is None:
        return
    for _ in range(batches):
        next(fetcher)
    fetcher.fetched -= batches  # the loop adds them itself
