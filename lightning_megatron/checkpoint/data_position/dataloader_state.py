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
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_megatron.checkpoint import rng_state, torch_private
from lightning_megatron.checkpoint.data_position import epoch_order

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
        order: The order that another kind of sampler has begun the epoch in, as ``epoch_order`` describes it.
    """

    at_iter: Record | None = None
    at_first: Record | None = None
    skip: int = 0
    order: Record | None = None


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
        self._followed: Record | None = None  # the order of the running epoch, where another sampler has begun it

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
            "sampler": type(self._sampler).__name__,
            "order": self._followed or epoch_order.describe(self._sampler, self._at_first),
            # Whether the sampler gives the same global batches on any number of replicas.
            "global_batches": bool(getattr(self.inner, "global_batches", False)),
            "at_iter": self._at_iter,
            "at_first": self._at_first,
            "generators": [g.get_state() for g in self._generators],
        }

    def order_to_follow(self, record: Record, epoch: int) -> Record | None:
        """The order in which another sampler has begun an epoch; None where this one goes on by itself.

        Args:
            record: What the other one's ``record`` returned.
            epoch: The number of the epoch.
        """
        own, saved = epoch_order.describe(self._sampler, None), record.get("order")
        if "order" not in record and record["seed"] is not None:  # an earlier version shared samples out on one rank
            shuffles = own is not None and own["kind"] == "random"
            saved = {"kind": "shared", "shuffle": shuffles, "seed": record["seed"], "epoch": epoch}
        if own is not None and saved is not None and own["kind"] == saved["kind"]:
            alike = own["kind"] != "shared" or (record["seed"] is not None and own["shuffle"] == saved["shuffle"])
            return None if alike else saved
        if saved is not None and epoch_order.can_follow(self.inner):
            return saved
        name = type(self._sampler).__name__
        if record.get("sampler", name) != name:
            rank_zero_warn(
                f"The checkpoint is from the middle of an epoch that a {record['sampler']} has begun, and here a {name}"
                " gives the samples: this epoch may have some of them twice, and others not at all. To have each once,"
                " resume on as many ranks, or from a checkpoint at an epoch's end."
            )
        return None

    def set_generators(self, states: list[Any]) -> None:
        """Restore the states of the loader's own generators."""
        for generator, state in zip(self._generators, states, strict=False):
            generator.set_state(state)

    def restart_workers(self) -> None:
        """Make persistent workers start again with the next iterator, and its seed."""
        torch_private.stop_persistent_workers(self._loader)

    @property
    def _sampler(self) -> Any:
        return getattr(self.inner, "sampler", self.inner)

    def _from(self, place: LoaderPosition) -> Iterator[Any]:
        """Yield the batches in their original order, without those that are skipped."""
        self.resume, self._untouched, self._followed = _START, False, place.order
        now = self._states()
        self._at_first = place.at_first or now
        self._set(self._at_first)
        batches = iter(self.inner if place.order is None else self._batches_in(place.order))
        for _ in range(place.skip):
            next(batches, None)
        if place.at_first is not None and self.is_indexed:
            rng_state.set_data_states(now["rng"])  # the loader's own generators continue from here
        yield from batches

    def _batches_in(self, order: Record) -> BatchSampler:
        numbers = epoch_order.share(epoch_order.indices(order, len(self._loader.dataset)), self._sampler)  # type: ignore[arg-type]
        return BatchSampler(numbers, self.inner.batch_size, self.inner.drop_last)

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
