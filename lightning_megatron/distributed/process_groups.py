"""A layout made into Megatron's process groups and random seeds. The only file that writes to ``parallel_state``."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from lightning_megatron.distributed.device import model_rng
from lightning_megatron.distributed.layout import ParallelLayout, RankCoordinates

# Megatron's scheme: pipeline stages start 100 apart; tensor-parallel ranks follow inside `model_parallel_...seed`.
_SEED_STEP_OF_PIPELINE_STAGES = 100

# Given to ``self.log(sync_dist_group=)``: the value is the whole world's already.
REDUCED = "reduced"

# The halves of an encoder-decoder model.
Stack = Literal["encoder", "decoder"]

T = TypeVar("T")

_timeout = timedelta(minutes=30)
_seed = 0


@dataclass
class _Standing:
    """The groups that stand, and the default group that they were made over.

    Anybody may end either (a user, Lightning, another library), so ``_still_standing`` is asked before each use.
    """

    world: Any = None  # a weak reference: whoever ends the default group ends its store, which others would find again
    layout: ParallelLayout | None = None
    timeout: timedelta = _timeout
    made: list[dist.ProcessGroup] = field(default_factory=list)  # for the layout, on this rank
    stacks: dict[Stack, dist.ProcessGroup] = field(default_factory=dict)
    host: tuple[dist.ProcessGroup, ...] = ()
    alone: bool = False  # whether the default group was made here, for a model without a run


_standing = _Standing()
_meetings = count()
_base: dist.Store | None = None


def build(layout: ParallelLayout, timeout: timedelta | None = None) -> None:
    """Make the process groups of ``layout``, or keep them where they stand already.

    Groups of other sizes are ended first. ``rebind`` gives a model that was built on ended groups those that stand.

    Args:
        layout: Of as many ranks as have met.
        timeout: Of collectives; None keeps what stands.

    Raises:
        RuntimeError: Another number of ranks has met.
    """
    standing = _still_standing()
    timeout = timeout or standing.timeout
    if standing.layout == layout and standing.timeout == timeout and _are_megatrons(standing.made):
        return
    if layout.world_size != dist.get_world_size():
        raise RuntimeError(
            f"The default process group has {dist.get_world_size()} ranks, and the layout has {layout.world_size}"
            f" (tp={layout.tp}, pp={layout.pp}, dp={layout.dp}). Something else in this program has made it: call"
            " torch.distributed.destroy_process_group() first, or give the Trainer as many devices."
        )
    _take_down()
    standing.timeout = timeout
    with _one_group_of_this_rank_alone(timeout):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp,
            distributed_timeout_minutes=timeout.total_seconds() / 60,
            create_gloo_process_groups=dist.get_backend() != "gloo",  # under Gloo every group is one already
        )
    made = parallel_state._global_process_group_list  # private (megatron-core 0.16.1): all it made, on this rank
    standing.made = list(dict.fromkeys(group for group in made if group is not None))
    _build_stacks(layout, timeout)
    standing.layout = layout


def rebind(model: torch.nn.Module) -> None:
    """Give the layers of ``model`` the groups that stand, where they were built on others of the same sizes."""
    collection = ProcessGroupCollection.use_mpu_process_groups()
    for layer in model.modules():
        for name, value in list(vars(layer).items()):
            if isinstance(value, ProcessGroupCollection):
                setattr(layer, name, collection)
            elif isinstance(value, dist.ProcessGroup):  # tp_group, pp_group, ...
                setattr(layer, name, getattr(collection, name.removesuffix("_group"), value))


def _still_standing() -> _Standing:
    """What stands, after forgetting what others have ended."""
    global _standing
    if _standing.world is not None and (not dist.is_initialized() or dist.group.WORLD is not _standing.world()):
        _forget_megatrons()
        _standing = _Standing()
    if _standing.world is None and dist.is_initialized():
        _standing.world = weakref.ref(dist.group.WORLD)
    return _standing


def _are_megatrons(made: list[dist.ProcessGroup]) -> bool:
    """Whether megatron-core still works with the groups that were ``made``, and all of them are alive."""
    alive = dist.distributed_c10d._world.pg_map  # private (torch 2.13), as megatron-core uses it
    return (
        parallel_state.model_parallel_is_initialized()
        and parallel_state.get_model_parallel_group() in made
        and all(group in alive for group in made)
    )


def _take_down() -> None:
    """End the layout's groups; the default one and those of the host stay."""
    standing = _still_standing()
    _forget_megatrons()
    alive = dist.distributed_c10d._world.pg_map
    for group in (*standing.made, *standing.stacks.values()):
        if group in alive:
            dist.destroy_process_group(group)
    standing.made.clear()
    standing.stacks.clear()
    standing.layout = None


def _forget_megatrons() -> None:
    """Have megatron-core hold on to no group; its own function leaves one behind (0.16.1)."""
    parallel_state.destroy_model_parallel()
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)


@contextmanager
def _one_group_of_this_rank_alone(timeout: timedelta) -> Iterator[None]:
    """Let all groups that would hold this rank only be one: each costs threads, sockets and a meeting of all ranks."""
    create, rank = parallel_state.create_group, dist.get_rank()
    alone: list[dist.ProcessGroup] = []

    def create_or_share(ranks: list[int], **options: Any) -> Any:
        if len(ranks) > 1 or options.get("pg_options") is not None:
            return create(ranks, **options)
        if ranks[0] != rank:
            return dist.GroupMember.NON_GROUP_MEMBER
        if not alone:
            alone.append(create(ranks, **{**options, "use_local_synchronization": True, "group_desc": "ALONE"}))
        return alone[0]

    parallel_state.create_group = create_or_share
    try:
        yield
    finally:
        parallel_state.create_group = create


def _build_stacks(layout: ParallelLayout, timeout: timedelta) -> None:
    """Make the groups of the pipeline ranks that hold the encoder's stages, and the decoder's; all ranks make all."""
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
                _standing.stacks[name] = group


def check_single_process() -> None:
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


def rendezvous_store(
    rank: int, world_size: int, timeout: timedelta, base: dist.Store | None = None
) -> dist.Store | None:
    """Where ranks meet: a part of a store that no earlier meeting has used.

    A store lives as long as any group that was made over it, also one in an object that nobody uses any more. Ranks
    that meet again on the same port would find it again, and in it the addresses of groups that have ended; or one
    would come while another is about to end it. So they leave the port at once, and keep a store of their own.

    Args:
        rank: This one.
        world_size: How many meet, at the ``MASTER_ADDR`` and ``MASTER_PORT`` of the environment.
        timeout: Of the meeting.
        base: A store of the ranks that is there already, of torchrun's.

    Returns:
        None where they have met.
    """
    global _base
    if dist.is_initialized():
        return None
    if world_size == 1:
        return dist.HashStore()
    if base is None:
        base = _base = _base or _own_store(rank, world_size, timeout)
    return dist.PrefixStore(f"lightning_megatron/meeting_{next(_meetings)}", base)


def _own_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A store on a port that the machine chooses, told at the agreed one."""
    agreed: dist.Store = next(iter(dist.rendezvous("env://", rank, world_size, timeout=timeout)))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return agreed  # it stays with torchrun's agent
    key, address = "lightning_megatron/port", os.environ["MASTER_ADDR"]
    if rank == 0:
        store = dist.TCPStore(address, 0, world_size, True, timeout, wait_for_workers=False)
        agreed.set(key, str(store.port))
    else:
        store = dist.TCPStore(address, int(agreed.get(key)), world_size, False, timeout)
    if store.add("here", 1) == world_size:
        store.set("all are here", "")
    store.wait(["all are here"], timeout)  # before rank 0 leaves the agreed one
    return store


def init_default_group(device: torch.device) -> None:
    """Meet the ranks that torchrun has started; or be alone, where nothing has."""
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = rendezvous_store(rank, ranks, _Standing.timeout)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
    else:
        _meet_nobody()


def _meet_nobody() -> None:
    carriers = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(carriers, store=dist.HashStore(), rank=0, world_size=1)
    _still_standing().alone = True


def world_size() -> int:
    """Ranks that have met."""
    return dist.get_world_size()


def destroy_if_made_for_build() -> None:
    """Make room for a run's groups, where a model was built without one."""
    if _still_standing().alone:
        destroy()


def destroy() -> None:
    """Leave no group behind; a model that was built on them can be called again after ``build`` and ``rebind``."""
    global _standing
    if dist.is_initialized():
        _take_down()
        dist.destroy_process_group()
    _forget_megatrons()
    _standing = _Standing()


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


def run_seed() -> int:
    """What ``seed`` was last told by rank 0, the same on every rank."""
    return _seed


def data_parallel() -> dist.ProcessGroup:
    """The group of the ranks that hold the same weights and read other data."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def gloo_world() -> dist.ProcessGroup:
    """A group of all ranks over Gloo, for what they say to each other on the host.

    Made at the first call, by all ranks.
    """
    return _hosts()[0]


def gloo_background() -> dist.ProcessGroup:
    """As ``gloo_world``, for a thread of its own: two threads on one group would take each other's messages."""
    return _hosts()[1]


def _hosts() -> tuple[dist.ProcessGroup, ...]:
    standing = _still_standing()
    alive = dist.distributed_c10d._world.pg_map
    if not standing.host or any(group not in alive for group in standing.host):
        standing.host = tuple(dist.new_group(backend="gloo", timeout=standing.timeout) for _ in range(2))
    return standing.host


def model_parallel() -> dist.ProcessGroup:
    """The group of the ranks that hold one copy of the model together, and read the same data."""
    return parallel_state.get_model_parallel_group()


def stack(name: Stack) -> dist.ProcessGroup:
    """The group of the pipeline ranks that hold stages of the encoder, or of the decoder, this one among them."""
    return _standing.stacks[name]


def tensor_parallel() -> dist.ProcessGroup:
    """The group of the ranks that share each layer."""
    return parallel_state.get_tensor_model_parallel_group()


def pipeline() -> dist.ProcessGroup:
    """The group of the pipeline stages of one copy of the model."""
    return parallel_state.get_pipeline_model_parallel_group()


def broadcast_object_from_last_stage(value: T) -> T:
    """Give every pipeline stage the last stage's picklable ``value``."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    box = [value]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast_object_list(box, src=last, group=pipeline())
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
    return gather(value, pipeline())


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
