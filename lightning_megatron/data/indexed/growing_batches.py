"""Makes a loader's batches grow in the first part of a training, by a rule of ``batch_size_rampup.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from lightning_megatron.data.indexed.batch_size_rampup import BatchSizes
from lightning_megatron.distributed.argument_names import answer_wrong_names


@answer_wrong_names
class RampUpBatches(Sampler[list[int]]):
    """A loader's ``batch_sampler`` whose batches grow; each is one optimizer step, so all counters stay right.

    Args:
        sampler: The sampler that gives the samples of this data-parallel rank, in order.
        batch_size: Number of samples that a batch of this rank has in the end.
        ramp_up: The rule by which the global batch grows.

    Raises:
        ValueError: The rule does not lead to ``batch_size``, or its numbers do not divide by the ranks.
    """

    global_batches = True  # equally many batches are the same samples, whatever the number of replicas

    def __init__(self, sampler: DistributedSampler[Any], batch_size: int, ramp_up: BatchSizes) -> None:
        ramp_up.check(batch_size * sampler.num_replicas, sampler.num_replicas)
        self.sampler = sampler
        self.full = batch_size * sampler.num_replicas
        self.ramp_up = ramp_up

    def following(self, consumed: int) -> int:
        """Samples of the global batch that follows ``consumed`` samples; schedules that count samples ask for it."""
        return self.ramp_up.size(consumed, self.full)

    def __iter__(self) -> Iterator[list[int]]:
        samples = iter(self.sampler)
        for size in self._sizes():
            yield [next(samples) for _ in range(size)]

    def __len__(self) -> int:
        return sum(1 for _ in self._sizes())

    def _sizes(self) -> Iterator[int]:
        """Sizes of this rank's batches that the epoch's samples fill."""
        replicas, left = self.sampler.num_replicas, len(self.sampler)
        consumed = self.sampler.epoch * left * replicas
        while (size := self.ramp_up.size(consumed, self.full) // replicas) <= left:
            yield size
            left -= size
            consumed += size * replicas


def ramp_up_loader(dataset: Dataset[Any], batches: RampUpBatches, **options: Any) -> DataLoader[Any]:
    """A loader of growing batches, to which Lightning gives no sampler of its own."""
    loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=batches, **options)
    # Beside a batch sampler, torch sets a sampler that only Lightning reads, and refuses an assignment to it.
    loader.__dict__["sampler"] = batches.sampler
    return loader
