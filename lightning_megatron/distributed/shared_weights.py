"""Keeps copies of a weight on several pipeline stages equal: the same initial values, and summed gradients.

megatron-core does this for the embedding that the first and the last stage share. T5's relative position bias, one
table for all layers of a stack, has a copy on each stage of its stack, and so several on one rank under interleaving.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.distributed.process_groups import Stack


def mark_shared(weight: torch.nn.Parameter, stack: Stack, number: int) -> None:
    """Mark ``weight`` as copy ``number``, from 0, of a weight that all stages of ``stack`` hold.

    A stack has at most one such weight. megatron-core reads two of the marks: ``shared``, set on all copies but one,
    leaves a copy out of norms; ``shared_embedding`` gives a copy a bucket of its own, so that the distributed optimizer
    divides all copies alike.
    """
    weight.shared_by_stack = stack  # type: ignore[attr-defined]
    weight.shared = number > 0  # type: ignore[attr-defined]
    weight.shared_embedding = True  # type: ignore[attr-defined]


def broadcast_initial_values(chunks: Iterable[torch.nn.Module]) -> None:
    """Copy the values of the stack's first rank to all copies."""
    for stack, weights in _by_stack(chunks):
        group = process_groups.stack(stack)
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
    for stack, weights in _by_stack(chunks):
        gradients = [weight.main_grad for weight in weights if weight.requires_grad]  # type: ignore[attr-defined]
        if gradients:
            for other in gradients[1:]:
                gradients[0].add_(other)
            dist.all_reduce(gradients[0], group=process_groups.stack(stack))
            for other in gradients[1:]:
                other.copy_(gradients[0])


def _by_stack(chunks: Iterable[torch.nn.Module]) -> list[tuple[Stack, list[torch.nn.Parameter]]]:
    """This rank's copies by stack, in the same order on all ranks."""
    found: dict[Stack, list[torch.nn.Parameter]] = {"encoder": [], "decoder": []}
    for chunk in chunks:
        for weight in chunk.parameters():
            stack = getattr(weight, "shared_by_stack", None)
            if stack is not None:
                found[stack].append(weight)
    return [(stack, weights) for stack, weights in found.items() if weights]
