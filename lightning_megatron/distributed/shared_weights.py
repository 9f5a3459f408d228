"""Weights of which each pipeline stage of a stack holds a copy: equal at the start, and their gradients summed.

megatron-core does it for the embedding that the first and the last stage share. T5's position bias, one table for all
layers of a stack, has a copy on each of the stack's stages, so several on one rank under interleaving.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.distributed.process_groups import Stack


def mark_shared(weight: torch.nn.Parameter, stack: Stack, number: int) -> None:
    """Say that ``weight`` is copy ``number``, from 0, of a weight that all stages of ``stack`` hold.

    Its stack has one such weight. megatron-core reads two of the marks: ``shared``, of all copies but one, leaves them
    out of norms; ``shared_embedding`` gives a weight a bucket of its own, so that the distributed optimizer cuts all
    copies alike.
    """
    weight.shared_by_stack = stack  # type: ignore[attr-defined]
    weight.shared = number > 0  # type: ignore[attr-defined]
    weight.shared_embedding = True  # type: ignore[attr-defined]


def broadcast_initial_values(chunks: Iterable[torch.nn.Module]) -> None:
    """Give all copies the values of the stack's first rank."""
    for stack, weights in _by_stack(chunks):
        group = process_groups.stack(stack)
        dist.broadcast(weights[0].data, src=dist.get_global_rank(group, 0), group=group)
        for other in weights[1:]:
            other.data.copy_(weights[0].data)


def freeze_all_copies(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Freeze all copies of a weight of which any stage has frozen its own, the shared embedding's included.

    Stages sum the gradients of copies: one that took no part would leave the others waiting.

    Args:
        parameters: This rank's, under the whole model's names.
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
    """Give all copies the sum of their gradients, once those are reduced over the replicas."""
    for stack, weights in _by_stack(chunks):
        gradients = [weight.main_grad for weight in weights if weight.requires_grad]  # type: ignore[attr-defined]
        if gradients:
            for other in gradients[1:]:
                gradients[0].add_(other)
            dist.all_reduce(gradients[0], group=process_groups.stack(stack))
            for other in gradients[1:]:
                other.copy_(gradients[0])


def _by_stack(chunks: Iterable[torch.nn.Module]) -> list[tuple[Stack, list[torch.nn.Parameter]]]:
    """This rank's copies, in one order of stacks on all ranks."""
    found: dict[Stack, list[torch.nn.Parameter]] = {"encoder": [], "decoder": []}
    for chunk in chunks:
        for weight in chunk.parameters():
            stack = getattr(weight, "shared_by_stack", None)
            if stack is not None:
                found[stack].append(weight)
    return [(stack, weights) for stack, weights in found.items() if weights]
