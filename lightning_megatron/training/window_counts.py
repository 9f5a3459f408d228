"""Sums what layers have counted in an accumulation window over all ranks, and tells them the sum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron.distributed import process_groups


def counting_layers(chunks: Iterable[torch.nn.Module]) -> list[Any]:
    """The layers that count: those with ``window_counts``, which returns a vector, and ``end_window``, which takes it.

    What a layer of one pipeline stage counts, all ranks of that stage count.
    """
    return [layer for chunk in chunks for layer in chunk.modules() if hasattr(layer, "window_counts")]


@torch.no_grad()
def finish(layers: list[Any]) -> None:
    """Tell each layer what all ranks have counted, in one message for all of them."""
    if not layers:
        return
    counts = [layer.window_counts() for layer in layers]
    totals = torch.cat(counts)
    dist.all_reduce(totals, group=process_groups.stage())
    for layer, total in zip(layers, totals.split([len(count) for count in counts]), strict=True):
        layer.end_window(total)
