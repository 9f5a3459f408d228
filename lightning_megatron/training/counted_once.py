"""Sums over the weights of the whole model, each counted once, whichever ranks hold copies of it.

The copies of a dense layer's weights and those of an expert's are on other ranks: experts are divided over ranks that
are replicas to the dense layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from lightning_megatron.distributed import process_groups


def set_groups(inner: MegatronOptimizer, *, distributed: bool, experts_are_divided: bool) -> None:
    """Note over which ranks the optimizer's sums go: those that hold the model's gradients, or its slices, together.

    Args:
        inner: megatron-core's optimizer.
        distributed: Whether each rank has slices of the weights, which no other rank has.
        experts_are_divided: Whether experts' copies are on other ranks than those of dense layers.
    """
    world = dist.group.WORLD
    dense = world if distributed else process_groups.one_copy()
    experts = process_groups.expert_model_parallel() if experts_are_divided and not distributed else dense
    inner.summing_groups = dense, experts
    # megatron-core asks all of these ranks whether a gradient has overflowed, and all must hear of an expert's.
    inner.grad_stats_parallel_group = world if experts_are_divided else dense


def mark(weight: torch.Tensor, main_weight: torch.Tensor) -> None:
    """Mark what the optimizer updates in place of an expert's weight; megatron-core does so for its other marks."""
    if is_divided_expert(weight):
        main_weight.allreduce = False  # type: ignore[attr-defined]


def is_divided_expert(weight: torch.Tensor) -> bool:
    """Whether a weight is an expert's whose copies are on other ranks than those of dense layers."""
    return not getattr(weight, "allreduce", True)


@torch.no_grad()
def total(
    inner: MegatronOptimizer,
    weights: Iterable[torch.Tensor],
    value: Callable[[list[torch.Tensor]], torch.Tensor],
) -> torch.Tensor:
    """The sum of a number over the weights of all ranks, each counted once; the same on every rank.

    Args:
        inner: megatron-core's optimizer.
        weights: The weights of this rank, or its slices of them.
        value: The number of some of them, a scalar on the device; of none, 0.
    """
    dense: list[torch.Tensor] = []
    experts: list[torch.Tensor] = []
    first_of_expert = process_groups.expert_tensor_parallel().rank() == 0
    for weight in weights:
        if is_divided_expert(weight):
            if getattr(weight, "tensor_model_parallel", False) or first_of_expert:
                experts.append(weight)
        elif param_is_not_shared(weight) and param_is_not_tensor_parallel_duplicate(weight):
            dense.append(weight)
    of_dense, of_experts = inner.summing_groups
    if of_dense is of_experts:
        summed = value(dense + experts)
        dist.all_reduce(summed, group=of_dense)
        return summed
    parts = value(dense), value(experts)
    for part, group in zip(parts, (of_dense, of_experts), strict=True):
        dist.all_reduce(part, group=group)
    return parts[0] + parts[1]
