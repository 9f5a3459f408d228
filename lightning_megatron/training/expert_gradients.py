"""Sums the gradients of weights that expert-tensor-parallel ranks hold whole, each of which computes a part of them.

Such are the halves of low-rank updates of experts that are not divided with the expert.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from lightning_megatron.distributed import process_groups


@torch.no_grad()
def sum_parts(chunks: Iterable[torch.nn.Module]) -> None:
    """Replace the gradients of weights marked ``seen_in_parts`` by their sum, after the sum over the copies."""
    gradients = [
        weight.main_grad  # type: ignore[attr-defined]
        for chunk in chunks
        for weight in chunk.parameters()
        if weight.requires_grad and getattr(weight, "seen_in_parts", False)
    ]
    if gradients:
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(joined, group=process_groups.expert_tensor_parallel())
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, summed in zip(gradients, joined.split(sizes), strict=True):
            gradient.copy_(summed.view_as(gradient))
