"""Keeps copies of a weight on several pipeline stages equal: the same initial values, and summed gradients.

megatron-core does this for an embedding that is the last stage's output layer, too. T5's relative position bias, one
table for all layers of a stack, has a copy on each stage of its stack, and so several on one rank under interleaving.
Multi-token prediction has a copy of the embedding on the last stage, whatever the output layer is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist

from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.distributed.process_groups import Stack

# The stages that hold a copy: all of a stack, or the first and the last.
Holders = Stack | Literal["ends"]


def mark_shared(weight: torch.nn.Parameter, holders: Holders, number: int) -> None:
    """Mark ``weight`` as copy ``number``, from 0, of a weight that all of these stages hold.

    They have at most one such weight. megatron-core reads two of the marks: ``shared``, set on all copies but one,
    leaves a copy out of norms; ``shared_embedding`` gives a copy a bucket of its own, so that the distributed optimizer
    divides all copies alike.
    """
    weight.shared_by = holders  # type: ignore[attr-defined]
    weight.shared = number > 0  # type: ignore[attr-defined]
    weight.shared_embedding = True  # type: ignore[attr-defined]


def broadcast_initial_values(chunks: Iterable[torch.nn.Module]) -> None:
    """Copy the values of the first stage that holds a copy to all others."""
    for group, weights in _copies(chunks):
        dist.broadcast(weights[0].data, src=dist.get_global_rank(group, 0), group=group)
        for other in weights[1:]:
            other.data.copy_(weights[0].data)


def freeze_all_copies(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Freeze all copies of a weight if any stage has frozen its copy; copies of the shared embedding too.

    The stages sum the gradients of the copies: a stage that took no part would leave the others waiting.

    Args:
        parameters: This rank's parameters, under the whole model's names.
    """
    shared: dict[str, list[torch.nn.Parameter]] = {}
    for name, weight in parameters:
        if getattr(weight, "shared_embedding", False):
            shared.setdefault(name, []).append(weight)
    frozen = {name for name, weights in shared.items() if not all(weight.requires_grad for weight in weights)}
    for name in set().union(*collectives.gather_from_stages(frozen)):
        for weight in shared.get(name, ()):
            weight.requires_grad_(False)


def all_reduce_gradients(chunks: Iterable[torch.nn.Module]) -> None:
    """Replace the gradients of all copies by their sum, after they were reduced over the replicas."""
    for group, weights in _copies(chunks):
        gradients = [weight.main_grad for weight in weights if weight.requires_grad]  # type: ignore[attr-defined]
        if gradients:
            for other in gradients[1:]:
                gradients[0].add_(other)
            dist.all_reduce(gradients[0], group=group)
            for other in gradients[1:]:
                other.copy_(gradients[0])


def _copies(chunks: Iterable[torch.nn.Module]) -> list[tuple[dist.ProcessGroup, list[torch.nn.Parameter]]]:
    """This rank's copies by the group of ranks that hold them, in the same order on all ranks."""
    found: dict[Holders, list[torch.nn.Parameter]] = {"encoder": [], "decoder": [], "ends": []}
    for chunk in chunks:
        for weight in chunk.parameters():
            holders = getattr(weight, "shared_by", None)
            if holders is not None:
                found[holders].append(weight)
    return [(_group(holders), weights) for holders, weights in found.items() if weights]


def _group(holders: Holders) -> dist.ProcessGroup:
    return process_groups.pipeline_ends() if holders == "ends" else process_groups.stack(holders)
