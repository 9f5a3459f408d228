"""Records the position of a training DataLoader, and lets it continue from there.

A loader's batches follow from two random states: the state when its iterator was created, from which torch draws the
workers' seed, and the state when its first batch was requested, from which a sampler draws its order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.data import sized_len
from torch.utils.data import DataLoader, IterableDataset

from lightning_megatron.checkpoint import rng_state

Record = dict[str, Any]
Replace = Callable[[Any, str, Any], None]  # has an attribute of an object be another one until the run ends

_NOTHING = object()
_UNKNOWN: Record = {
    "rows": None, "seed": None, "global_batches": False, "at_iter": None, "at_first": None, "generators": [],
}  # fmt: skip


def tracked(loader: Any) -> Any:
    """Return the loader, or a copy of it whose position is tracked; a loader with ``state_dict`` tracks its own."""
    if is_stateful(loader):
        return loader if sized_len(loader) is not None else _PrefetchedLoader(loader)
    if not isinstance(loader, DataLoader):
        return loader
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    inner = getattr(loader, name)
    if inner is None or isinstance(inner, TrackedSampler):
        return loader
    # A copy, since the user's loader may be read elsewhere too. DataLoader refuses assignments to its samplers; nothing
    # else in it refers to them.
    loader = copy.copy(loader)
    loader.__dict__[name] = TrackedSampler(inner, loader)
    return loader


def tracked_sampler(loader: Any) -> TrackedSampler | None:
    """The tracked sampler of a loader, if it has one."""
    for name in ("batch_sampler", "sampler"):
        if isinstance(inner := getattr(loader, name, None), TrackedSampler):
            return inner
    return None


def is_stateful(loader: Any) -> bool:
    """Whether a loader has ``state_dict`` and ``load_state_dict``."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def loader_record(loader: Any) -> Record:
    """What a checkpoint stores of a loader; nothing is known of a loader without samplers."""
    batches = tracked_sampler(loader)
    return _UNKNOWN if batches is None else batches.record()


@dataclass(frozen=True)
class LoaderPosition:
    """The position from which a loader continues.

    Args:
        at_iter: The random states when its iterator was created; None keeps the present ones.
        at_first: The random states when its first batch was requested; None if none was.
        skip: Batches to skip by their numbers.
    """

    at_iter: Record | None = None
    at_first: Record | None = None
    skip: int = 0


_START = LoaderPosition()


class TrackedSampler:
    """Wraps a loader's batch sampler and remembers the random states that its order came from."""

    def __init__(self, inner: Any, loader: DataLoader[Any]) -> None:
        self.inner = inner
        self.is_indexed = not isinstance(loader.dataset, IterableDataset)
        self.rows = loader.batch_size
        self.resume = _START
        self._loader = loader
        self._untouched = False  # whether no batch has been requested from the last iterator
        self._generators = [g for g in (loader.generator, getattr(self._sampler, "generator", None)) if g is not None]
        self._seed_taken: int | None = None
        self._at_iter: Record | None = None
        self._at_first: Record | None = None

    def __getattr__(self, name: str) -> Any:
        if "inner" not in self.__dict__:  # while this object is copied
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        # With workers an iterator is created twice; torch draws their seed after the first time.
        again = self._loader.num_workers > 0 and self._untouched
        self._untouched = True
        if not again:
            self._set(self.resume.at_iter)
            self._at_iter, self._at_first = self._states(), None
        return self._from(self.resume)

    @property
    def seed(self) -> int | None:
        """The seed of a distributed sampler, from which, with the number of the epoch, its order follows."""
        seed = getattr(self._sampler, "seed", None) if self._seed_taken is None else self._seed_taken
        return seed if isinstance(seed, int) else None

    def take_seed(self, seed: int, replace: Replace) -> None:
        """Draw the order from ``seed`` from now on; the sampler may be the user's, who gets its own back."""
        replace(self._sampler, "seed", seed)
        self._seed_taken = seed

    def record(self) -> Record:
        """What a checkpoint stores."""
        return {
            "rows": self.rows,
            "seed": self.seed,
            # Whether the sampler gives the same global batches on any number of replicas.
            "global_batches": bool(getattr(self.inner, "global_batches", False)),
            "at_iter": self._at_iter,
            "at_first": self._at_first,
            "generators": [g.get_state() for g in self._generators],
        }

    def set_generators(self, states: list[Any]) -> None:
        """Restore the states of the loader's own generators."""
        for generator, state in zip(self._generators, states, strict=False):
            generator.set_state(state)

    def restart_workers(self) -> None:
        """Make persistent workers start again with the next iterator, and its seed."""
        self._loader._iterator = None  # private (torch 2.13)

    @property
    def _sampler(self) -> Any:
        return getattr(self.inner, "sampler", self.inner)

    def _from(self, place: LoaderPosition) -> Iterator[Any]:
        """Yield the batches in their original order, without those that are skipped."""
        self.resume, self._untouched = _START, False
        now = self._states()
        self._at_first = place.at_first or now
        self._set(self._at_first)
        batches = iter(self.inner)
        for _ in range(place.skip):
            next(batches, None)
        if place.at_first is not None and self.is_indexed:
            rng_state.set_data_states(now["rng"])  # the loader's own generators continue from here
        yield from batches

    def _states(self) -> Record:
        return {"rng": rng_state.data_states(), "generators": [g.get_state() for g in self._generators]}

    def _set(self, states: Record | None) -> None:
        if states is not None:
            rng_state.set_data_states(states["rng"])
            self.set_generators(states["generators"])


class _PrefetchedLoader:
    """Wraps a stateful loader without a length: Lightning reads one batch ahead, and this gives the state before it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._before: Any = None

    def __getattr__(self, name: str) -> Any:
        if "loader" not in self.__dict__:  # while this object is copied
            raise AttributeError(name)
        return getattr(self.__dict__["loader"], name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            self._before = copy.deepcopy(self.loader.state_dict())
            batch = next(batches, _NOTHING)
            if batch is _NOTHING:
                return
            yield batch

    def state_dict(self) -> Any:
        return self.loader.state_dict() if self._before is None else self._before

    def load_state_dict(self, state: Any) -> None:
        self.loader.load_state_dict(state)
