"""Rules by which the global batch grows in the first part of a training: Megatron's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from lightning_megatron.distributed.argument_names import answer_wrong_names


class BatchSizes(ABC):
    """A rule by which the global batch grows: ``RampUp`` or ``BatchSizeSteps``."""

    @abstractmethod
    def check(self, full: int, replicas: int) -> None:
        """Refuse a global batch of ``full`` samples on ``replicas`` that the rule does not lead to.

        Raises:
            ValueError: The rule does not lead to ``full``, or does not divide by ``replicas``.
        """

    @abstractmethod
    def size(self, consumed: int, full: int) -> int:
        """Samples of the global batch that follows ``consumed`` samples, and is ``full`` in the end."""

    def consumed(self, batches: int, full: int) -> int:
        """Return the number of samples in the first ``batches`` global batches."""
        total = 0
        for _ in range(batches):
            total += self.size(total, full)
        return total


@answer_wrong_names
@dataclass(frozen=True)
class RampUp(BatchSizes):
    """Grows the global batch in equal steps, as Megatron's ``--rampup-batch-size START INCREMENT SAMPLES`` does.

    Args:
        start: Number of samples of the first global batches.
        increment: Number of samples by which the global batch grows at a time.
        samples: Number of training samples over which it grows, in steps of equal length.

    Raises:
        ValueError: A number is below 1.
    """

    start: int
    increment: int
    samples: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not _is_whole(value):
                raise ValueError(f"RampUp({name}={value!r}) must be at least 1, and a whole number.")

    def check(self, full: int, replicas: int) -> None:
        """Refuse a global batch of ``full`` samples on ``replicas`` that the rule does not lead to.

        Raises:
            ValueError: The rule does not lead to ``full``, or does not divide by ``replicas``.
        """
        if full < self.start or (full - self.start) % self.increment:
            steps = max((full - self.start) // self.increment, 0)
            raise ValueError(
                f"RampUp(start={self.start}, increment={self.increment}) does not lead to a global batch of {full}."
                f" Use a global batch of {self.start + steps * self.increment} or"
                f" {self.start + (steps + 1) * self.increment}."
            )
        for name in ("start", "increment"):
            if getattr(self, name) % replicas:
                raise ValueError(
                    f"RampUp({name}={getattr(self, name)}) does not divide by the {replicas} data-parallel ranks that"
                    " share each batch."
                )

    def size(self, consumed: int, full: int) -> int:
        """Samples of the global batch that follows ``consumed`` samples, and is ``full`` in the end.

        As megatron-core's ``RampupBatchsizeNumMicroBatchesCalculator``.
        """
        steps = (full - self.start) // self.increment
        if steps == 0 or consumed > self.samples:
            return full
        return min(self.start + int(consumed / (self.samples / steps)) * self.increment, full)


@answer_wrong_names
@dataclass(frozen=True)
class BatchSizeSteps(BatchSizes):
    """Gives the global batch a size for each part of training, as Megatron's ``--step-batch-size-schedule`` does.

    Args:
        sizes: Maps a number of training samples to the size of the global batch from there on: ``{0: 16, 8000: 32}``.

    Raises:
        ValueError: There is no size for 0 samples, or a number is out of range.
    """

    sizes: dict[int, int]

    def __post_init__(self) -> None:
        sizes = self.sizes if isinstance(self.sizes, dict) else {}
        if 0 not in sizes or not all(_is_whole(start, 0) and _is_whole(size) for start, size in sizes.items()):
            raise ValueError(f"BatchSizeSteps(sizes={self.sizes}): give a size of 1 or more from 0 samples on.")

    def check(self, full: int, replicas: int) -> None:
        """Refuse another size at the end, and sizes that ``replicas`` cannot share.

        Raises:
            ValueError: The rule does not lead to ``full``, or does not divide by ``replicas``.
        """
        last = self.sizes[max(self.sizes)]
        if last != full:
            raise ValueError(f"BatchSizeSteps(sizes={self.sizes}) ends at {last}, and the global batch is {full}.")
        for size in self.sizes.values():
            if size % replicas:
                raise ValueError(
                    f"BatchSizeSteps(sizes={self.sizes}): {size} does not divide by the {replicas} data-parallel ranks"
                    " that share each batch."
                )

    def size(self, consumed: int, full: int) -> int:
        """Samples of the global batch that follows ``consumed`` samples."""
        return self.sizes[max(start for start in self.sizes if start <= consumed)]


def _is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
