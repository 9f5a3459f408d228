"""Each sample of an evaluation counts once, however the loader makes its batches.

torch's ``DistributedSampler`` repeats samples so that every replica has as many as the others. Here a replica reads its
own share only. One that has fewer batches than the others would leave them waiting, so it computes its last batch
again, and that is not counted.
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


class Share(DistributedSampler):  # type: ignore[type-arg]
    """This replica's samples, none of them repeated.

    Attributes:
        is_repeated: Whether there were too few samples for this replica, so that it has another's, not to be counted.
    """

    def __init__(self, source: Any, **settings: Any) -> None:
        super().__init__(source, **settings)
        own = len(range(self.rank, len(source), self.num_replicas))
        self.is_repeated = not own
        if own:
            self.num_samples, self.total_size = own, len(source)

    def __iter__(self) -> Iterator[Any]:
        """Numbers of samples; of a wrapped sampler, what it gives in their places."""
        if not isinstance(self.dataset, lightning_private.DatasetSamplerWrapper):
            return super().__iter__()
        self.dataset.reset()
        return (self.dataset[place] for place in super().__iter__())


def resolve_sampler(
    trainer: pl.Trainer, loader: DataLoader[Any], shuffle: bool, mode: RunningStage | None = None
) -> Any:
    """In place of Lightning's: samples of evaluations and predictions are shared out by ``Share``.

    A plain module's evaluation is reduced by Lightning, which wants as many samples on every replica.

    Args:
        trainer: Whose loader it is.
        loader: Whatever its batches are made by.
        shuffle: Whether the replicas draw their samples in a random order.
        mode: The stage that reads it.
    """
    predicts = mode == RunningStage.PREDICTING
    evaluates = mode is not None and mode.evaluating and isinstance(trainer.lightning_module, MegatronModule)
    if not (predicts or evaluates) or not lightning_private.requires_distributed_sampler(trainer, loader):
        return lightning_private.resolve_sampler(trainer, loader, shuffle, mode)
    plain = isinstance(loader.sampler, RandomSampler | SequentialSampler) and not predicts
    return Share(
        loader.dataset if plain else lightning_private.DatasetSamplerWrapper(loader.sampler),
        shuffle=shuffle and not trainer.overfit_batches,  # type: ignore[attr-defined]
        seed=int(os.getenv("PL_GLOBAL_SEED", 0)),
        **(trainer.distributed_sampler_kwargs or {}),
    )


def each_once(loader: Any) -> Any:
    """A loader of which every replica reads as many batches as the others, and counts each sample once.

    With ``drop_last`` each replica drops of its own share what fills no batch. A loader of unknown length stays as it
    is: see ``peers.EvenLoader``. Called on all ranks.
    """
    if not dist.is_initialized() or process_groups.data_parallel().size() == 1:
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
    return _AsLongAsTheOthers(loader, batches, 0 if repeated else own)


class _AsLongAsTheOthers:
    """A loader that goes on with its last batch, which is not counted, until the other replicas' loaders end.

    Args:
        loader: This replica's; everything but iteration and length is its own.
        batches: As many as it gives.
        own: As many of them are counted.
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
    """Whether this batch of the running evaluation is one that is computed, but not counted."""
    combined = lightning_private.combined_loader(lightning_private.evaluation_loop(trainer))
    assert combined is not None
    one_by_one = lightning_private.combining_mode(combined) == "sequential"
    loaders = [combined.flattened[dataloader_idx]] if one_by_one else combined.flattened
    own = [getattr(loader, "own_batches", None) for loader in loaders]
    return all(number is not None and batch_idx >= number for number in own)


def sampler_of(loader: Any) -> Any:
    """The ``DistributedSampler`` that a loader's numbers of samples come from, if there is one."""
    holder, name = _sampler_place(loader)
    return getattr(holder, name) if name else None


def _sampler_place(loader: Any) -> tuple[Any, str]:
    """The loader or its batch sampler, and the name under which it holds the ``DistributedSampler``."""
    batching = getattr(loader, "batch_sampler", None)
    holder = loader if batching is None else batching
    held = vars(holder) if hasattr(holder, "__dict__") else {}
    return holder, next((name for name, x in held.items() if isinstance(x, DistributedSampler)), "")


def without_repeats(loader: Any) -> Any:
    """The loader, or a copy of it whose ``DistributedSampler``, which the user made, repeats nothing."""
    holder, name = _sampler_place(loader)
    sampler = getattr(holder, name) if name else None
    known = (DistributedSampler.__iter__, DistributedSamplerWrapper.__iter__)  # other ones may rely on their numbers
    if sampler is None or sampler.drop_last or type(sampler).__iter__ not in known:
        return loader
    total = len(sampler.dataset)
    own = len(range(sampler.rank, total, sampler.num_replicas))
    sampler, made = copy(sampler), copy(loader)  # the user's stay as they are
    if own:
        sampler.num_samples, sampler.total_size = own, total
    sampler.is_repeated = not own
    if holder is loader:
        made.__dict__[name] = sampler  # DataLoader refuses to have it assigned
        return made
    made.__dict__["batch_sampler"] = holder = copy(holder)
    setattr(holder, name, sampler)
    if isinstance(holder, lightning_private.IndexBatchSamplerWrapper):  # it holds the one that is read
        setattr(lightning_private.copy_inner_batch_sampler(holder, copy), name, sampler)
    if isinstance(made.__dict__.get("sampler"), DistributedSampler):
        made.__dict__["sampler"] = sampler
    return made
