"""The order of an epoch's samples, for a run that goes on in it with another kind of sampler.

A plain module has torch's own samplers on one rank, and a ``DistributedSampler`` on several. An epoch that one of them
has begun is finished in its order by the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler

from lightning_megatron.checkpoint import rng_state

Record = dict[str, Any]


def describe(sampler: Any, states: Record | None) -> Record | None:
    """What the order follows from: plain data for a checkpoint; None for samplers whose order is not known.

    Args:
        sampler: The sampler of single samples.
        states: The random states in which it draws the epoch's order, and those of its own generators.
    """
    if type(sampler) is DistributedSampler:
        return {"kind": "shared", "shuffle": sampler.shuffle, "seed": sampler.seed, "epoch": sampler.epoch}
    if type(sampler) is SequentialSampler:
        return {"kind": "sequential"}
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return {"kind": "random", "states": states}
    return None


def indices(order: Record, samples: int) -> list[int]:
    """The numbers of all samples in the order that ``describe`` was told of.

    Args:
        order: What ``describe`` returned.
        samples: The size of the dataset.
    """
    numbers = range(samples)
    if order["kind"] == "shared":
        sampler: DistributedSampler[int] = DistributedSampler(numbers, 1, 0, order["shuffle"], order["seed"])  # type: ignore[arg-type]
        sampler.set_epoch(order["epoch"])
        return list(sampler)
    if order["kind"] == "sequential":
        return list(numbers)
    before, own = rng_state.data_states(), order["states"]["generators"]
    generator = None
    if own:  # that of the sampler is the last
        generator = torch.Generator()
        generator.set_state(own[-1])
    rng_state.set_data_states(order["states"]["rng"])
    drawn = list(RandomSampler(numbers, generator=generator))
    rng_state.set_data_states(before)
    return drawn


def share(order: list[int], sampler: Any) -> list[int]:
    """The samples of ``order`` that this replica reads, repeated or cut to equal shares like by its ``sampler``."""
    if not isinstance(sampler, DistributedSampler):
        return order
    repeated = order * -(-sampler.total_size // max(len(order), 1))
    return repeated[sampler.rank : sampler.total_size : sampler.num_replicas]


def can_follow(batch_sampler: Any) -> bool:
    """Whether batches of another order can be made in place of this sampler's."""
    return type(batch_sampler) is BatchSampler and describe(batch_sampler.sampler, None) is not None
