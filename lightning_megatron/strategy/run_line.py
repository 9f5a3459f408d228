"""Says in one line what runs: the ranks, their layout and back end, and the micro-batches of a batch."""

from __future__ import annotations

from functools import cache

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.training.microbatches import MicroBatchSizes


def run_line(layout: ParallelLayout, backend: str, cut: MicroBatchSizes, counts_rows: bool) -> str:
    """The line, such as "4 ranks: tp=2, pp=2, dp=1 over gloo; 8 micro-batches of 2".

    Args:
        layout: The parallel sizes.
        backend: The back end of the ranks' process group.
        cut: The micro-batches of the first batch.
        counts_rows: Whether ``cut`` has rows; a plain module's batch of any type has not.
    """
    ranks = f"{layout.world_size} ranks: {layout.sizes} over {backend}" if layout.world_size > 1 else "1 rank"
    count = len(cut.sizes)
    micro_batches = f"{count} micro-batch{'es' if count > 1 else ''}"
    return f"{ranks}; {micro_batches}{f' of {cut.sizes[0]}' if counts_rows else ''}"


def tell(layout: ParallelLayout, cut: MicroBatchSizes, counts_rows: bool) -> None:
    """Print the line on rank 0, once for runs that are alike."""
    backend = dist.get_backend() if dist.is_initialized() else "none"
    _print_once(run_line(layout, backend, cut, counts_rows))


@cache
def _print_once(line: str) -> None:
    rank_zero_info(line)
