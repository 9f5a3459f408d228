"""Each sample of an evaluation counts once, also where the replicas cannot share the samples out evenly.

torch's ``DistributedSampler`` repeats samples so that every replica has as many as the others. Here the repeated ones
are left out; only where a replica would have fewer batches than the others, and leave them waiting, it keeps the
repeated sample as a batch that is computed but not counted.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DistributedSampler


def leave_out_repeats(loader: Any) -> Any:
    """A loader that reads each sample of its set on one replica only, if ``loader`` has a ``DistributedSampler``.

    With ``drop_last`` it is left as it is: what a replica drops depends on how many samples it has.
    """
    sampler, batch_size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or batch_size is None or loader.drop_last or sampler.drop_last:
        return loader
    total = len(sampler.dataset)  # type: ignore[arg-type]
    if total % sampler.num_replicas == 0:
        return loader
    loader, sampler, batches = copy(loader), copy(sampler), copy(loader.batch_sampler)  # the user's stay as they are
    batches.sampler = sampler
    loader.__dict__.update(sampler=sampler, batch_sampler=batches)  # DataLoader refuses to have them assigned
    own = len(range(sampler.rank, total, sampler.num_replicas))
    if math.ceil(own / batch_size) == math.ceil(math.ceil(total / sampler.num_replicas) / batch_size):
        sampler.num_samples, sampler.total_size = own, total
    else:
        sampler.last_batch_is_repeated = True  # type: ignore[attr-defined]
    return loader


def is_repeated_batch(trainer: pl.Trainer, batch_idx: int, dataloader_idx: int = 0) -> bool:
    """Whether this batch of the running evaluation holds nothing but a sample that another replica counts."""
    loaders = trainer._evaluation_loop._combined_loader  # private (Lightning 2.6): the loaders as Lightning made them
    assert loaders is not None
    loader = loaders.flattened[dataloader_idx]
    repeated = getattr(getattr(loader, "sampler", None), "last_batch_is_repeated", False)
    return repeated and batch_idx == len(loader) - 1
