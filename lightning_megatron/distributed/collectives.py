"""Collectives over the process groups: broadcasting, gathering and averaging objects and tensors."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from lightning_megatron.distributed import process_groups

T = TypeVar("T")


def broadcast_object_from_last_stage(value: T) -> T:
    """Give every pipeline stage the last stage's picklable ``value``."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    box = [value]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast_object_list(box, src=last, group=process_groups.pipeline())
    return box[0]


def broadcast_from_first_copy(tensors: list[torch.Tensor]) -> None:
    """Overwrite ``tensors`` with those of the first rank with the same weights, in one broadcast for each dtype."""
    first = dist.get_global_rank(process_groups.data_parallel(), 0)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        joined = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
        dist.broadcast(joined, src=first, group=process_groups.data_parallel())
        for tensor, values in zip(alike, joined.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.detach().copy_(values.view_as(tensor))


def gather_from_stages(value: T) -> list[T]:
    """Gather the picklable ``value`` of each pipeline stage, from first to last, on every stage."""
    return gather(value, process_groups.pipeline())


def gather_from_replicas(value: T) -> list[T]:
    """Gather the picklable ``value`` of each replica, which reads its own data, in order, on every replica."""
    return gather(value, process_groups.replicas())


def gather(value: T, group: dist.ProcessGroup) -> list[T]:
    """Gather the picklable ``value`` of each rank of ``group``, in order of rank, on every rank of it."""
    if group.size() == 1:
        return [value]
    values: list[T] = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def on_any_rank(*flags: bool) -> tuple[bool, ...]:
    """Whether each flag is set on any rank; all ranks call this. The hosts ask one another, not waiting for devices."""
    if dist.get_world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.uint8, device="cpu")
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=process_groups.gloo_world())
    return tuple(bool(vote) for vote in votes.tolist())


def sum_over_parts_of_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of ``tensor`` over the ranks that share the tokens of each row, without gradients."""
    group = process_groups.context_parallel()
    if group.size() == 1:
        return tensor
    summed = tensor.detach().clone()
    dist.all_reduce(summed, group=group)
    return summed


def gather_with_gradients(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather tensors of one shape into ``[ranks, ...]``, differentiably.

    The gradient of a rank's ``tensor`` is the sum over all ranks of the gradients of its entry.
    """
    gathered: torch.Tensor = _Gathering.apply(tensor, group)  # type: ignore[no-untyped-call]
    return gathered


class _Gathering(torch.autograd.Function):
    """An all-gather with a backward pass. Over Gloo, torch's own (2.13) mistakes ranks of a group for global ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        each = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(each, tensor.contiguous(), group=group)
        return torch.stack(each)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(gradients[0], ctx.group)[ctx.group.rank()], None


def sum_with_gradients(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of ``tensor`` over the ranks of a group, differentiably.

    The gradient of a rank's ``tensor`` is the sum over all ranks of the gradients of the sum that each was given.
    """
    summed: torch.Tensor = _Summing.apply(tensor, group)  # type: ignore[no-untyped-call]
    return summed


class _Summing(torch.autograd.Function):
    """An all-reduce, forward and backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(gradients[0], ctx.group), None


def _sum(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    summed = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=group)
    return summed


def gather_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    """Join vocabulary-sharded logits ``[..., vocab/tp]`` into ``[..., vocab]`` on every tensor-parallel rank."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(shards, logits.contiguous(), group=process_groups.tensor_parallel())
    return torch.cat(shards, dim=-1)


def average_losses_across_data_parallel_group(
    losses: list[torch.Tensor], weights: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """Average scalar losses over the data-parallel replicas.

    Args:
        losses: Scalars of this replica, in the same order on every replica.
        weights: One weight per loss, such as its number of tokens; None weighs every replica alike.

    Returns:
        A vector ``[len(losses)]`` of the averages, detached, the same on every replica.
    """
    values = torch.stack([loss.detach().double().reshape(()) for loss in losses])
    if weights is None:
        shares = torch.ones_like(values)
    else:
        shares = torch.stack([torch.as_tensor(w, device=values.device).double().reshape(()) for w in weights])
    both = torch.stack([values * shares, shares])
    dist.all_reduce(both, group=process_groups.data_parallel())
    return (both[0] / both[1].clamp(min=torch.finfo(both.dtype).tiny)).float()
