"""Resumes a run at the same sample: the same shuffles, no sample twice and none skipped.

A checkpoint stores the random states that each loader's batches follow from, and the number of batches read since. A
resumed run lets Lightning create its iterators, and creates them again before the first batch is read: each from its
own states, and without the batches that were read. All other random numbers (dropout, augmentation) continue from the
states of the save.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_megatron.checkpoint import rng_state
from lightning_megatron.checkpoint.data_position import loop_progress
from lightning_megatron.checkpoint.data_position.dataloader_state import (
    LoaderPosition,
    Record,
    Replace,
    is_stateful,
    loader_record,
    tracked,
    tracked_sampler,
)
from lightning_megatron.checkpoint.data_position.loop_progress import Position
from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.distributed import lightning_private, process_groups

_NOTHING = object()


class Resumption:
    """Records the position of a run in its data, and after a load continues from the saved position.

    Args:
        skip_batches: Batches to skip after a load; a checkpoint that is saved afterwards does not skip them again.
    """

    def __init__(self, skip_batches: int = 0) -> None:
        self._skip_batches = skip_batches
        self.reset()

    def reset(self) -> None:
        """Discard the loaded position: a new run begins, or one that uses only the loaded weights."""
        self._saved: Record | None = None
        self._same_layout = False
        self._window: Record | None = None
        self._left_out = 0
        self._seeds: dict[int, int] = {}
        self._ended: tuple[Any, rng_state.States] | None = None

    def track(self, loader: Any, replace: Replace) -> Any:
        """Track the position of a training loader; a loader with ``state_dict`` tracks its own.

        Args:
            loader: The training loader of this epoch, or of all epochs.
            replace: Sets an attribute of the loader's sampler until the run ends.
        """
        loader = tracked(loader)
        batches = tracked_sampler(loader)
        if batches is not None and batches.seed in self._seeds:  # created during a resumed run, for a new epoch
            batches.take_seed(self._seeds[batches.seed], replace)
        return loader

    def record(self, trainer: pl.Trainer, where: Position, data_parallel_size: int) -> Record:
        """What a checkpoint stores of this rank's loaders and random states.

        Raises:
            CheckpointError: Batches of the accumulation window would have to be read again, but the loader cannot go
                back.
        """
        if where.redo and any(map(is_stateful, _loaders(trainer))):
            raise CheckpointError(
                f"A checkpoint that is saved {where.redo} batches into an accumulation window has to read them again,"
                " but this loader has a state_dict of its own and cannot go back. Save between windows, with"
                " every_n_train_steps; saves by time or on an exception may fall inside a window."
            )
        states = self._ended[1] if self._ended is not None else None
        now = self._window if where.redo and self._window is not None else _now(trainer, where.batches, states)
        return {
            "epoch": where.epoch,
            "batches": where.batches,
            "begun": where.begun,
            "replicas": data_parallel_size,
            "left_out": self._left_out,
            "made_in": lightning_private.last_reload_epoch(trainer),
            **now,
        }

    def load(self, record: Record, same_layout: bool) -> None:
        """Continue from a ``record``.

        Args:
            record: The record of this rank, or of a rank that read the same data.
            same_layout: Whether the record is of a rank with the same coordinates in the same layout.
        """
        self._saved, self._same_layout = record, same_layout

    def begin(self, trainer: pl.Trainer) -> None:
        """Restore the saved random states, and prepare the loaders; called before the first batch is read."""
        if self._saved is not None:
            # Lightning warns of every loader without `state_dict`, but these continue where they were.
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
            for loader, record in zip(_loaders(trainer), self._saved["loaders"], strict=False):
                if (batches := tracked_sampler(loader)) is not None:
                    batches.set_generators(record["generators"])
            # So that loaders are created again before the same epochs (reload_dataloaders_every_n_epochs).
            lightning_private.set_last_reload_epoch(trainer, self._saved["made_in"])
            self._restore(self._saved)

    def end(self, trainer: pl.Trainer) -> None:
        """Keep the loaders and random states at the end of a fit, for a save after later evaluations."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._ended = lightning_private.combined_loader(trainer.fit_loop), rng_state.snapshot()

    def restore_fit_loaders(self, trainer: pl.Trainer) -> None:
        """Give the fit's loaders back to its loop, from which Lightning takes them at the start of an evaluation."""
        if self._ended is not None:
            lightning_private.set_combined_loader(trainer.fit_loop, self._ended[0])

    def advance(self, trainer: pl.Trainer, replace: Replace, fetcher: Any) -> None:
        """Stand in for the epoch loop's ``advance``: before a resumed run's first batch, go on where the run was."""
        self._before_batch(trainer, replace)
        loop = trainer.fit_loop.epoch_loop
        type(loop).advance(loop, fetcher)

    def _before_batch(self, trainer: pl.Trainer, replace: Replace) -> None:
        saved, self._saved = self._saved, None
        if saved is not None:
            self._go_on(trainer, saved, replace)
            lightning_private.end_restart(trainer)
        count, done = trainer.accumulate_grad_batches, loop_progress.processed(trainer)
        if count > 1 and done % count == 0:  # the window's batches may have to be read again
            self._window = _now(trainer, done)

    def _go_on(self, trainer: pl.Trainer, saved: Record, replace: Replace) -> None:
        """Create the iterators again, at the saved positions."""
        fetcher = lightning_private.data_fetcher(trainer)
        loaders, records = _loaders(trainer), saved["loaders"]
        if saved["begun"] and len(loaders) != len(records):
            raise MisconfigurationException(
                f"The checkpoint is from the middle of an epoch over {len(records)} training loaders, and this run has"
                f" {len(loaders)}. Resume with {len(records)} loaders, or from a checkpoint at an epoch's end."
            )
        self._take_seeds(loaders, records, replace)
        lightning_private.load_loader_states(trainer, saved["combined_loader"] or [])
        replicas = dist.get_world_size(process_groups.replicas())
        done, more = _batches_now(saved, loaders, replicas), self._to_leave_out(saved)
        _check_left(trainer, done, more)
        to_read = []
        for loader, record in zip(loaders, records if saved["begun"] else [None] * len(loaders), strict=True):
            given = 0 if record is None or is_stateful(loader) else _converted(saved, record, loader, replicas)
            batches = tracked_sampler(loader)
            by_number = batches is not None and batches.is_indexed
            if batches is not None:
                at_iter, at_first = (record["at_iter"], record["at_first"]) if record else (None, None)
                order = batches.order_to_follow(record, saved["epoch"]) if record and by_number else None
                batches.resume = LoaderPosition(at_iter, at_first, given + more if by_number else 0, order)
                if record is not None:
                    batches.restart_workers()
            to_read.append(0 if by_number else given + more)
        _iterate(fetcher, to_read)
        loop_progress.set_batches(trainer, done + more)
        fetcher.fetched = done + more
        if saved["begun"]:
            self._restore(saved)

    def _restore(self, saved: Record) -> None:
        if self._same_layout:
            rng_state.restore(saved["rng"])
        else:
            rng_state.set_data_states(saved["rng"]["data"])

    def _take_seeds(self, loaders: list[Any], records: list[Record], replace: Replace) -> None:
        """Take over the saved seeds of distributed samplers, from which their order follows."""
        for loader, record in zip(loaders, records, strict=False):
            batches = tracked_sampler(loader)
            if batches is not None and batches.seed is not None and record["seed"] is not None:
                self._seeds[batches.seed] = record["seed"]
                batches.take_seed(record["seed"], replace)

    def _to_leave_out(self, saved: Record) -> int:
        """``skip_batches``, or 0 if the run that saved has skipped them already."""
        self._left_out = self._skip_batches
        if not self._skip_batches or saved["left_out"] != self._skip_batches:
            return self._skip_batches
        rank_zero_warn(
            f"Checkpointing(skip_batches={self._skip_batches}) was applied before this checkpoint was saved, and is"
            " not applied again. To skip more batches from here, use another number."
        )
        return 0


def _loaders(trainer: pl.Trainer) -> list[Any]:
    combined = lightning_private.combined_loader(trainer.fit_loop)
    return [] if combined is None else combined.flattened


def _now(trainer: pl.Trainer, batches: int, states: rng_state.States | None = None) -> Record:
    """The random states (``states``, or the present ones), and the loaders' positions after ``batches``."""
    combined = lightning_private.combined_loader(trainer.fit_loop)
    cycles = combined is not None and lightning_private.combining_mode(combined) == "max_size_cycle"
    return {
        "rng": rng_state.snapshot() if states is None else states,
        "loaders": [_record(loader, batches, cycles) for loader in _loaders(trainer)],
    }


def _record(loader: Any, batches: int, cycles: bool) -> Record:
    """The position of one loader. A shorter loader than another has ended, or started again (``cycles``)."""
    length, given = sized_len(loader), batches
    if length and batches > length:
        given = (batches - 1) % length + 1 if cycles else length
    return {"given": given, **loader_record(loader)}


def _batches_now(saved: Record, loaders: list[Any], replicas: int) -> int:
    """How many batches of this run's size the consumed samples are.

    Raises:
        MisconfigurationException: They are not a whole number of batches, or their number is not known.
    """
    if not saved["begun"]:
        return 0
    each = {
        _converted(saved, {**record, "given": saved["batches"]}, loader, replicas)
        for loader, record in zip(loaders, saved["loaders"], strict=True)
    }
    if len(each) > 1:
        raise MisconfigurationException(
            f"The batch sizes of the training loaders have changed by different factors: the consumed samples are"
            f" {sorted(each)} of their batches. Change all batch sizes by one factor, or resume from a checkpoint at an"
            " epoch's end."
        )
    return each.pop() if each else int(saved["batches"])


def _converted(saved: Record, record: Record, loader: Any, replicas: int) -> int:
    """The number of batches that a loader has given, converted to its batch size in this run."""
    inner, given, before = tracked_sampler(loader), int(record["given"]), record["rows"]
    rows = inner.rows if inner is not None else None
    same = replicas == saved["replicas"] and (rows == before or None in (rows, before))
    if same or not given or record["global_batches"]:
        return given
    if before is None or rows is None:
        raise MisconfigurationException(
            f"The checkpoint is from the middle of an epoch on {saved['replicas']} data-parallel replicas, and this run"
            f" has {replicas}; the loader has no batch_size, so the number of consumed samples is not known. Resume"
            f" with {saved['replicas']} replicas, or from a checkpoint at an epoch's end."
        )
    samples = given * before * saved["replicas"]
    if samples % (rows * replicas):
        fits = [n for n in range(1, samples // replicas + 1) if samples % (n * replicas) == 0]
        raise MisconfigurationException(
            f"The checkpoint has consumed {samples} samples of its epoch ({given} batches of {before} on"
            f" {saved['replicas']} replicas), which are not a whole number of batches of {rows} on {replicas} replicas."
            f" Use batch_size={before * saved['replicas'] // replicas or 1}"
            f"{' or ' + ', '.join(map(str, fits[-3:])) if fits else ''}, or a checkpoint at an epoch's end."
        )
    return samples // (rows * replicas)


def _check_left(trainer: pl.Trainer, done: int, more: int) -> None:
    left = trainer.fit_loop.max_batches - done
    if more and more >= left:
        raise MisconfigurationException(
            f"Checkpointing(skip_batches={more}): the checkpoint's epoch has {left} batches left, and at least one"
            f" of them has to be trained on. Use at most {left - 1}, or resume from a checkpoint of the next epoch."
        )


def _iterate(fetcher: Any, to_read: list[int]) -> None:
    """Do what ``iter(fetcher)`` does, but read and discard the first batches of each loader."""
    for batches, count in zip(lightning_private.start_fetcher(fetcher), to_read, strict=True):
        for number in range(count):
            if next(batches, _NOTHING) is _NOTHING:
                raise MisconfigurationException(
                    f"The training loader ended after {number} batches, but the run has to continue after {count}:"
                    " those of the epoch that the checkpoint has consumed, and Checkpointing(skip_batches=)."
                )
    if fetcher.length is None:
        with suppress(StopIteration):
            lightning_private.fetch_ahead(fetcher)
