"""A layout made into Megatron's process groups and random seeds. The only file that writes to ``parallel_state``."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from lightning_megatron.backend import model_rng
from lightning_megatron.layout import ParallelLayout, RankCoordinates

# Megatron's scheme: pipeline stages start 100 apart; tensor-parallel ranks follow inside `model_parallel_...seed`.
_SEED_STEP_OF_PIPELINE_STAGES = 100

# Given to ``self.log(sync_dist_group=)``: the value is the whole world's already.
REDUCED = "reduced"

# The halves of an encoder-decoder model.
Stack = Literal["encoder", "decoder"]

T = TypeVar("T")

_built: ParallelLayout | None = None
_host: tuple[dist.ProcessGroup, ...] | None = None
_stacks: dict[Stack, dist.ProcessGroup] = {}
_alone = False
_timeout = timedelta(minutes=30)
_seed = 0


def build(layout: ParallelLayout, timeout: timedelta = _timeout) -> None:
    """Make the process groups of ``layout``, or keep them where they stand already.

    Groups of other sizes are replaced. Models built on the old groups hold on to them, so an earlier strategy in this
    process can be used again: its own ``build`` then brings its groups back.
    """
    global _built, _timeout
    _timeout = timeout
    if parallel_state.model_parallel_is_initialized():
        if _built == layout:
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=dist.get_backend() != "gloo",  # under Gloo every group is one already
    )
    _build_stacks(layout, timeout)
    _built = layout


def _build_stacks(layout: ParallelLayout, timeout: timedelta) -> None:
    """Make the groups of the pipeline ranks that hold the encoder's stages, and the decoder's; all ranks make all."""
    _stacks.clear()
    split = layout.pipeline_split_rank
    if split is None:
        return
    stages: dict[Stack, range] = {"encoder": range(split), "decoder": range(split, layout.num_stages)}
    pipelines = [layout.group("pp", rank) for rank in range(layout.world_size // layout.pp)]  # pp is the slowest
    for name, numbers in stages.items():
        for pipeline in pipelines:
            ranks = sorted({pipeline[number % layout.pp] for number in numbers})
            group = dist.new_group(ranks, timeout=timeout)
            if dist.get_rank() in ranks:
                _stacks[name] = group


def check_alone() -> None:
    """Refuse to build a whole model where this process is one of several.

    Raises:
        RuntimeError: It is a rank of a larger run.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"A whole model is built on one process, and this is one of {dist.get_world_size()} ranks. Inside a run,"
            " give the checkpoint to the Trainer (ckpt_path=); outside of one, call build(tp=..., pp=...) on all ranks."
        )


def default_device() -> torch.device:
    """This rank's GPU of its machine, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def join(device: torch.device) -> None:
    """Meet the ranks that torchrun has started; or be alone, where nothing has."""
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    else:
        _meet_nobody()


def _meet_nobody() -> None:
    global _alone
    carriers = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(carriers, store=dist.HashStore(), rank=0, world_size=1)
    _alone = True


def world_size() -> int:
    """Ranks that have met."""
    return dist.get_world_size()


def end_alone() -> None:
    """Make room for a run's groups; models that were built alone cannot be called any more."""
    if _alone:
        end()


def end() -> None:
    """Leave no group behind; models that were built on them cannot be called any more."""
    global _alone, _built, _host
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    _alone, _built, _host = False, None, None


def coordinates() -> RankCoordinates:
    """Where this rank sits in the groups."""
    return RankCoordinates(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
    )


def seed(base: int) -> None:
    """Seed the model's random numbers from rank 0's ``base``, by Megatron's scheme.

    Tensor-parallel ranks and pipeline stages get seeds of their own, data-parallel replicas the same ones. The
    generators that data loading draws from stay as the user seeded them.
    """
    global _seed
    shared = [base]
    dist.broadcast_object_list(shared, src=0)
    _seed = shared[0]
    with model_rng():
        stage = parallel_state.get_pipeline_model_parallel_rank()
        model_parallel_cuda_manual_seed(shared[0] % 2**31 + _SEED_STEP_OF_PIPELINE_STAGES * stage)


def seed_of_run() -> int:
    """What ``seed`` was last told by rank 0, the same on every rank."""
    return _seed


def data_parallel() -> dist.ProcessGroup:
    """The group of the ranks that hold the same weights and read other data."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def on_host() -> dist.ProcessGroup:
    """A group of all ranks over Gloo, for what they say to each other on the host.

    Made at the first call, by all ranks.
    """
    return _hosts()[0]


def beside_training() -> dist.ProcessGroup:
    """As ``on_host``, for a thread of its own: two threads on one group would take each other's messages."""
    return _hosts()[1]


def _hosts() -> tuple[dist.ProcessGroup, ...]:
    global _host
    if _host is None:
        _host = tuple(dist.new_group(backend="gloo", timeout=_timeout) for _ in range(2))
    return _host


def model_parallel() -> dist.ProcessGroup:
    """The group of the ranks that hold one copy of the model together, and read the same data."""
    return parallel_state.get_model_parallel_group()


def stack(name: Stack) -> dist.ProcessGroup:
    """The group of the pipeline ranks that hold stages of the encoder, or of the decoder, this one among them."""
    return _stacks[name]


def tensor_parallel() -> dist.ProcessGroup:
    """The group of the ranks that share each layer."""
    return parallel_state.get_tensor_model_parallel_group()


def stages() -> dist.ProcessGroup:
    """The group of the pipeline stages of one copy of the model."""
    return parallel_state.get_pipeline_model_parallel_group()


def broadcast_object_from_last_stage(value: T) -> T:
    """Give every pipeline stage the last stage's picklable ``value``."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    box = [value]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast_object_list(box, src=last, group=stages())
    return box[0]


def broadcast_from_first_replica(tensors: list[torch.Tensor]) -> None:
    """Give every data-parallel replica the first one's ``tensors``, in place, in one message for each type."""
    first = dist.get_global_rank(data_parallel(), 0)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        joined = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
        dist.broadcast(joined, src=first, group=data_parallel())
        for tensor, values in zip(alike, joined.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.detach().copy_(values.view_as(tensor))


def gather_from_stages(value: T) -> list[T]:
    """Each pipeline stage's picklable ``value``, first to last, on every stage."""
    return gather(value, stages())


def gather_from_replicas(value: T) -> list[T]:
    """Each data-parallel replica's picklable ``value``, in their order, on every replica."""
    return gather(value, data_parallel())


def gather(value: T, group: dist.ProcessGroup) -> list[T]:
    """The picklable ``value`` of each rank of ``group``, in its order, on all of them."""
    if group.size() == 1:
        return [value]
    values: list[T] = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_with_gradients(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Each rank's ``tensor``, of one shape, as ``[ranks, ...]``; a rank's gradient is the sum of what all ranks' is."""
    gathered: torch.Tensor = _Gathering.apply(tensor, group)  # type: ignore[no-untyped-call]
    return gathered


class _Gathering(torch.autograd.Function):
    """torch's own takes ranks of a group for ranks of the world in its backward over Gloo (2.13)."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        each = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(each, tensor.contiguous(), group=group)
        return torch.stack(each)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.group)
        return summed[ctx.group.rank()], None


def gather_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    """Join vocabulary-sharded logits ``[..., vocab/tp]`` into ``[..., vocab]`` on every tensor-parallel rank."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(shards, logits.contiguous(), group=tensor_parallel())
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
        heavy = torch.ones_like(values)
    else:
        heavy = torch.stack([torch.as_tensor(w, device=values.device).double().reshape(()) for w in weights])
    both = torch.stack([values * heavy, heavy])
    dist.all_reduce(both, group=data_parallel())
    return (both[0] / both[1].clamp(min=torch.finfo(both.dtype).tiny)).float()
