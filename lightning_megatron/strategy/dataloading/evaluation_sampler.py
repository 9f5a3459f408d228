"""Shares the samples of an evaluation over the replicas, so that each sample counts once.

torch's ``DistributedSampler`` repeats samples until every replica has equally many. Here a replica reads only its own
share. A replica with fewer batches than the others would leave them waiting in a collective, so it runs its last batch
again, and the result is not counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import copy
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_megatron.distributed import collectives, lightning_private, process_groups
from lightning_megatron.models.megatron_module import MegatronModule


class EvaluationSampler(DistributedSampler):  # type: ignore[type-arg]
    """Gives this replica its share of the samples, none of them repeated.

    Attributes:
        is_repeated: Whether there are too few samples to give this replica one. It then reads a sample of another
            replica, which is not counted.
    """

    def __init__(self, source: Any, **settings: Any) -> None:
        super().__init__(source, **settings)
        own = len(range(self.rank, len(source), self.num_replicas))
        self.is_repeated = not own
        if own:
            self.num_samples, self.total_size = own, len(source)

    def __iter__(self) -> Iterator[Any]:
        """Yield the indices of the samples, or what a wrapped sampler gives at these indices."""
        if not isinstance(self.dataset, lightning_private.DatasetSamplerWrapper):
            return super().__iter__()
        self.dataset.reset()
        return (self.dataset[place] for place in super().__iter__())


def resolve_sampler(
    trainer: pl.Trainer, loader: DataLoader[Any], shuffle: bool, mode: RunningStage | None = None
) -> Any:
    """Choose a loader's sampler, in place of the Trainer's own method.

    Samples of evaluations and predictions are shared out by ``EvaluationSampler``. A plain module's evaluation keeps
    Lightning's sampler, because Lightning reduces its results and expects equally many samples on every replica.

    Args:
        trainer: The Trainer that reads the loader.
        loader: The loader.
        shuffle: Whether the samples are read in a random order.
        mode: The stage in which the loader is read.
    """
    predicts = mode == RunningStage.PREDICTING
    evaluates = mode is not None and mode.evaluating and isinstance(trainer.lightning_module, MegatronModule)
    if not (predicts or evaluates) or not lightning_private.requires_distributed_sampler(trainer, loader):
        return lightning_private.resolve_sampler(trainer, loader, shuffle, mode)
    plain = isinstance(loader.sampler, RandomSampler | SequentialSampler) and not predicts
    return EvaluationSampler(
        loader.dataset if plain else lightning_private.DatasetSamplerWrapper(loader.sampler),
        shuffle=shuffle and not trainer.overfit_batches,  # type: ignore[attr-defined]
        seed=int(os.getenv("PL_GLOBAL_SEED", 0)),
        **(trainer.distributed_sampler_kwargs or {}),
    )


def each_once(loader: Any) -> Any:
    """Make a loader of which every replica reads equally many batches, and counts each sample once.

    All ranks call this together. With ``drop_last`` each replica drops the last samples of its share that fill no
    batch. A loader of unknown length is returned as it is: ``rank_consistency.EvenLoader`` handles it.
    """
    if not dist.is_initialized() or process_groups.replicas().size() == 1:
        return loader
    loader = without_repeats(loader)
    sampler = sampler_of(loader)
    repeated = getattr(sampler, "is_repeated", False)
    own = sized_len(loader)
    told = collectives.gather_from_replicas((own, repeated))
    every = [length for length, _ in told if length]
    if own is None or len(every) < len(told):
        return loader
    batches = max(every)
    if all(length == batches for length in every) and not any(is_repeated for _, is_repeated in told):
        return loader
    return _PaddedLoader(loader, batches, 0 if repeated else own)


class _PaddedLoader:
    """Repeats the last batch of a loader, uncounted, until the other replicas' loaders end.

    Args:
        loader: This replica's loader, which answers everything but iteration and length.
        batches: The number of batches that are read, repeated ones included.
        own: The number of batches that are counted.
    """

    def __init__(self, loader: Any, batches: int, own: int) -> None:
        self._loader = loader
        self._batches = batches
        self.own_batches = own

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # while this object is copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        given, batch = 0, None
        for batch in self._loader:
            given += 1
            yield batch
        for _ in range(given, self._batches):
            yield batch


def is_repeated_batch(trainer: pl.Trainer, batch_idx: int, dataloader_idx: int = 0) -> bool:
    """Whether this batch of the running evaluation repeats another one, so that it is computed but not counted."""
    combined = lightning_private.combined_loader(lightning_private.evaluation_loop(trainer))
    assert combined is not None
    one_by_one = lightning_private.combining_mode(combined) == "sequential"
    loaders = [combined.flattened[dataloader_idx]] if one_by_one else combined.flattened
    own = [getattr(loader, "own_batches", None) for loader in loaders]
    return all(number is not None and batch_idx >= number for number in own)


def sampler_of(loader: Any) -> Any:
    """The ``DistributedSampler`` that chooses a loader's samples, or None."""
    holder, name = _sampler_place(loader)
    return getattr(holder, name) if name else None


def _sampler_place(loader: Any) -> tuple[Any, str]:
    """The loader or its batch sampler, and the name under which it holds the ``DistributedSampler``."""
    batching = getattr(loader, "batch_sampler", None)
    holder = loader if batching is None else batching
    held = vars(holder) if hasattr(holder, "__dict__") else {}
    return holder, next((name for name, x in held.items() if isinstance(x, DistributedSampler)), "")


def without_repeats(loader: Any) -> Any:
    """Return the loader, or a copy of it whose ``DistributedSampler`` (one that the user made) repeats no sample."""
    holder, name = _sampler_place(loader)
    sampler = getattr(holder, name) if name else None
    known = (DistributedSampler.__iter__, DistributedSamplerWrapper.__iter__)  # others may rely on their numbers
    if sampler is None or sampler.drop_last or type(sampler).__iter__ not in known:
        return loader
    total = len(sampler.dataset)
    own = len(range(sampler.rank, total, sampler.num_replicas))
    sampler, made = copy(sampler), copy(loader)  # the user's own objects stay unchanged
    if own:
        sampler.num_samples, sampler.total_size = own, total
    sampler.is_repeated = not own
    if holder is loader:
        made.__dict__[name] = sampler  # DataLoader refuses an assignment
        return made
    made.__dict__["batch_sampler"] = holder = copy(holder)
    setattr(holder, name, sampler)
    if isinstance(holder, lightning_private.IndexBatchSamplerWrapper):  # the sampler that is read is the one inside it
        setattr(lightning_private.copy_inner_batch_sampler(holder, copy), name, sampler)
    if isinstance(made.__dict__.get("sampler"), DistributedSampler):
        made.__dict__["sampler"] = sampler
    return made
