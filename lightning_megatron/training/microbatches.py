"""Chooses the sizes of the micro-batches of a batch, and cuts the batch into them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.training.batch_rows import take_rows

# (p-1)/(n+p-1) of a pipeline's time is idle: with n = 4p micro-batches a fifth (arXiv 2104.04473, section 2.2).
_MICRO_BATCHES_PER_STAGE = 4


@dataclass(frozen=True)
class MicroBatchSizes:
    """Sizes of the micro-batches of one batch.

    Args:
        sizes: Rows of each micro-batch; all are equal under a pipeline, whose messages have one shape.
        num_padding: Number of further micro-batches with weight 0, copies of the first: the interleaved schedule takes
            multiples of ``pp`` only.
        counts: Whether the batch counts; if not, it is computed with weight 0.
    """

    sizes: tuple[int, ...]
    num_padding: int = 0
    counts: bool = True


@dataclass(frozen=True)
class MicroBatching:
    """How a run cuts its batches into micro-batches: by their size or by their number, or by the layout's need.

    Args:
        size: The rows of a micro-batch; None where the number or the layout decides.
        count: The micro-batches per batch; None where the size or the layout decides.
    """

    size: int | None = None
    count: int | None = None

    @property
    def is_chosen(self) -> bool:
        """Whether the user has chosen; otherwise the batch of a plain module stays whole."""
        return self.size is not None or self.count is not None

    def cut(self, layout: ParallelLayout, rows: int) -> MicroBatchSizes:
        """The micro-batches of a batch of ``rows``, smaller where the chosen size or number does not divide."""
        if layout.pp == 1:
            size = self.size or -(-rows // (self.count or 1))
            return MicroBatchSizes(tuple(min(size, rows - start) for start in range(0, rows, size)))
        count = self._even_count(layout, rows)
        return MicroBatchSizes((rows // count,) * count, -count % layout.microbatch_multiple)

    def _even_count(self, layout: ParallelLayout, rows: int) -> int:
        """The number of equal micro-batches for a pipeline: the nearest to the choice that ``rows`` can be cut into."""
        if self.size is not None:
            return next(rows // size for size in range(min(self.size, rows), 0, -1) if rows % size == 0)
        most = min(self.count or _MICRO_BATCHES_PER_STAGE * layout.pp, rows)
        counts = [count for count in range(most, 0, -1) if rows % count == 0]
        return next((count for count in counts if count % layout.microbatch_multiple == 0), counts[0])


def slices(batch: Any, sizes: MicroBatchSizes) -> Iterator[tuple[Any, float]]:
    """Yield each micro-batch with its share of the rows, which is 0 for padding and batches that do not count.

    Raises:
        ValueError: An entry of the batch has another number of rows; the text names it.
    """
    rows = sum(sizes.sizes)
    start = 0
    for size in sizes.sizes:
        yield take_rows(batch, start, start + size, rows), size / rows if sizes.counts else 0.0
        start += size
    for _ in range(sizes.num_padding):
        yield take_rows(batch, 0, sizes.sizes[0], rows), 0.0
