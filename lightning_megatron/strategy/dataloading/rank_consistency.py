"""Checks that the ranks of a replica read the same batches, and that all ranks read equally many."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader, IterableDataset

from lightning_megatron.distributed import collectives, lightning_private, process_groups

_ADVICE = (
    " If the loader shuffles, give these ranks the same seed (seed_everything). If you shard it by hand, shard it by"
    " strategy.data_parallel_rank and data_parallel_size. For random augmentation, use torch's default generator, or"
    " one that you seed with the sample's index."
)
_EQUALLY_MANY = (
    " Every rank must read equally many batches: cut the longer loaders, repeat batches of the shorter ones, or set"
    " limit_train_batches (or limit_val_batches) to the number that all of them have."
)

_OF_STATE = ("state_dict", "load_state_dict")


class DataError(RuntimeError):
    """Raised when ranks that must read the same data, or equally much, do not."""


def share_random_state() -> None:
    """Give the ranks of a replica the random state of its first rank, so that they shuffle and augment alike.

    The model draws its random numbers from other generators: see ``device.model_rng`` and megatron-core's tracker.
    """
    group = process_groups.model_parallel()
    if group.size() == 1:
        return
    box: list[Any] = [(random.getstate(), np.random.get_state(), torch.get_rng_state())]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[0], group=group)
    python, numpy, of_torch = box[0]
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(of_torch)


def check_same_batch(batch: Any) -> None:
    """Compare a batch over the ranks of a replica.

    Raises:
        DataError: They have read different batches, so that the model would train on inputs and labels that do not
            belong together. Every rank of the replica raises it.
    """
    group = process_groups.model_parallel()
    if group.size() == 1:
        return
    sums = collectives.gather(checksum(batch), group)
    if len(set(sums)) > 1:
        first, *others = _ranks_by(sums, group).values()
        raise DataError(
            f"{_one_model(group)} Ranks {first} have read one batch, and ranks {sorted(sum(others, []))} another."
            + _ADVICE
        )


def check_same_shapes(batch: Any) -> None:
    """Compare the shapes of a batch's tensors over the ranks of a replica, before ranks wait for tensors of others.

    The hosts ask one another, with two numbers; what is wrong is looked for only where they differ.

    Raises:
        DataError: They differ. Every rank of the replica raises it.
    """
    group = process_groups.model_parallel_over_gloo()
    if group.size() == 1:
        return
    shapes = _shapes(batch)
    number = zlib.crc32(shapes.encode())
    ends = torch.tensor([number, -number], device="cpu")
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    largest, minus_smallest = ends.tolist()
    if largest != -minus_smallest:
        read = _ranks_by(collectives.gather(shapes, group), group)
        told = ", ".join(f"ranks {ranks} have read {of}" for of, ranks in read.items())
        raise DataError(f"{_one_model(group)} In this batch, {told}.{_ADVICE}")


def _one_model(group: dist.ProcessGroup) -> str:
    return f"Ranks {dist.get_process_group_ranks(group)} hold one model together and must read the same batch."


def _ranks_by(values: list[Any], group: dist.ProcessGroup) -> dict[Any, list[int]]:
    """The ranks of a group by the value that each of them has."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in zip(dist.get_process_group_ranks(group), values, strict=True):
        ranks.setdefault(value, []).append(rank)
    return ranks


def _shapes(batch: Any) -> str:
    """The shapes of a batch's tensors in words, by their keys where it has some."""
    found: list[str] = []

    def add(tensor: torch.Tensor, name: str) -> None:
        found.append(f"{name}{list(tensor.shape)}")

    named = batch.items() if isinstance(batch, Mapping) else [("", batch)]
    for name, value in named:
        apply_to_collection(value, torch.Tensor, add, f"{name} " if name else "")
    return ", ".join(found) or "no tensors"


def check_numbers_of_batches(trainer: pl.Trainer) -> None:
    """Compare how many batches of each loader the ranks will read: all ranks, or in a prediction those of a replica.

    Batches behind ``max_steps`` do not count. Loaders of unknown length are compared while they are read.

    Raises:
        DataError: The numbers differ, so that ranks with more batches would wait for the others for ever. Every rank
            raises it.
    """
    group = process_groups.model_parallel() if trainer.predicting else dist.group.WORLD
    if trainer.training:
        steps = trainer.max_steps - trainer.global_step if trainer.max_steps >= 0 else float("inf")
        here = [min(trainer.num_training_batches, steps * trainer.accumulate_grad_batches)]
    else:
        loop = trainer.predict_loop if trainer.predicting else lightning_private.evaluation_loop(trainer)
        here = list(loop.max_batches)
    everyone = collectives.gather(here, group)  # type: ignore[arg-type]
    if any(other != everyone[0] for other in everyone):
        ranks = dist.get_process_group_ranks(group)
        shown = {rank: of[0] if len(of) == 1 else of for rank, of in zip(ranks, everyone, strict=True)}
        raise DataError(f"Ranks have different numbers of batches, by rank: {shown}.{_EQUALLY_MANY}")


def read_evenly(loader: Any, fills: bool) -> Any:
    """Watch a loader that may end earlier on one rank than on another.

    Such a loader has no length, or a length that it may not keep, because its samplers are the user's own.

    Args:
        loader: The user's loader.
        fills: See ``EvenLoader``.

    Returns:
        The loader, or an ``EvenLoader`` around it.
    """
    # Lightning counts batches outside of a run, without groups; a run sets its loaders up again.
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return loader
    if sized_len(loader) is None:
        return EvenLoader(loader, fills)
    return loader if _keeps_its_length(loader) else SizedEvenLoader(loader, fills)


def _keeps_its_length(loader: Any) -> bool:
    """Whether its samplers are torch's, Lightning's or this package's, or ``each_once`` has already made it even."""
    if getattr(loader, "own_batches", None) is not None:
        return True
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    samplers = [loader.sampler, loader.batch_sampler]
    samplers += [getattr(loader.batch_sampler, "sampler", None), *(getattr(each, "inner", None) for each in samplers)]
    known = ("torch.utils.data.", "lightning.", "lightning_megatron.")
    return all(sampler is None or type(sampler).__module__.startswith(known) for sampler in samplers)


class EvenLoader:
    """A loader of which every rank must read equally many batches.

    Before each batch the ranks vote on whether they all have one.

    Args:
        loader: The user's loader, which answers everything but iteration.
        fills: Whether a replica with fewer batches than the others repeats its last one, uncounted.

    Attributes:
        own_batches: The number of batches that are counted; None while all are.
    """

    def __init__(self, loader: Any, fills: bool = False) -> None:
        self._loader = loader
        self._fills = fills
        self.own_batches: int | None = None
        # Lightning asks for these by a Protocol, which from Python 3.12 on does not see what `__getattr__` answers.
        self.__dict__.update({name: getattr(loader, name) for name in _OF_STATE if hasattr(loader, name)})

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # while this object is copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        """Yield batches as long as all ranks have one.

        Raises:
            DataError: A rank has a batch and another has none, and repeating its last batch is not allowed or not
                possible. Every rank raises it.
        """
        batches, batch, read = iter(self._loader), None, 0
        self.own_batches = None
        while True:
            try:
                batch, here = next(batches), True
            except StopIteration:
                here = False
            some_have, some_lack = collectives.on_any_rank(here, not here)
            if some_have and some_lack and not (self._fills and self._may_fill(here, read)):
                self._complain(here, read)
            if not some_have:
                return
            if not here and self.own_batches is None:
                self.own_batches = read
            read += 1
            yield batch

    def _may_fill(self, here: bool, read: int) -> bool:
        """Whether the ranks of each replica have ended together, and each rank has read a batch that it can repeat."""
        peers = collectives.gather(here, process_groups.model_parallel())
        (unfit,) = collectives.on_any_rank(len(set(peers)) > 1 or not read)
        return not unfit

    def _complain(self, here: bool, read: int) -> None:
        every: list[bool] = [here] * dist.get_world_size()
        dist.all_gather_object(every, here)
        without = [rank for rank, has in enumerate(every) if not has]
        raise DataError(
            f"The loader of ranks {without} ended after {read} batches, and the other ranks' goes on.{_EQUALLY_MANY}"
        )


class SizedEvenLoader(EvenLoader):
    """An ``EvenLoader`` around a loader that has a length."""

    def __len__(self) -> int:
        return len(self._loader)


def checksum(batch: Any) -> int:
    """A number that differs between batches, or collections of any kind, whose tensors differ."""
    total = [0]

    def add(tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
        total[0] = zlib.crc32(repr(tuple(tensor.shape)).encode() + data.numpy().tobytes(), total[0])

    apply_to_collection(batch, torch.Tensor, add)
    return total[0]
