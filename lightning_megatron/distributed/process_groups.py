"""Creates and destroys the process groups of a layout, and seeds the model's random numbers."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from lightning_megatron.distributed import meeting, megatron_groups
from lightning_megatron.distributed.device import model_rng
from lightning_megatron.distributed.layout import ParallelLayout, RankCoordinates

# Megatron's scheme: the seeds of neighbouring pipeline stages differ by 100; `model_parallel_cuda_manual_seed` derives
# those of the tensor-parallel ranks.
_SEED_STEP_OF_PIPELINE_STAGES = 100
_DEFAULT_TIMEOUT = timedelta(minutes=30)

# Passed as ``self.log(sync_dist_group=)``: the value is already reduced over all ranks.
REDUCED = "reduced"

# The two stacks of an encoder-decoder model.
Stack = Literal["encoder", "decoder"]


@dataclass
class _State:
    """The process groups that exist, and what belongs to the whole process.

    Anybody may destroy the groups (a user, Lightning, another library), so ``_current`` is called before each use.

    Args:
        world: A weak reference to the default group that the other groups were made over. A strong one would keep the
            store of a destroyed group alive, and later ranks would find the old addresses in it.
        layout: The layout whose groups exist.
        timeout: How long a collective may take.
        timeout_now: How long it may take for the time being, if ``set_timeout`` has said so.
        groups: The groups of the layout that this rank is in.
        stacks: The groups of the pipeline ranks of each stack, for encoder-decoder models.
        model: The group of the ranks of one copy of the model; under context parallelism megatron-core has none.
        model_over_gloo: The same ranks over Gloo, where the other groups are not.
        gloo: The Gloo groups of all ranks: for the main thread, and for a thread that writes checkpoints.
        made_for_build: Whether the default group was made here, to build a model outside of a run.
        seed: The seed of the run, which ``reset`` keeps.
    """

    world: Any = None
    layout: ParallelLayout | None = None
    timeout: timedelta = _DEFAULT_TIMEOUT
    timeout_now: timedelta | None = None
    groups: list[dist.ProcessGroup] = field(default_factory=list)
    stacks: dict[Stack, dist.ProcessGroup] = field(default_factory=dict)
    model: dist.ProcessGroup | None = None
    model_over_gloo: dist.ProcessGroup | None = None
    gloo: tuple[dist.ProcessGroup, ...] = ()
    made_for_build: bool = False
    seed: int = 0

    def reset(self) -> None:
        """Forget the groups, after the default group was destroyed."""
        vars(self).update(vars(_State(seed=self.seed)))


_state = _State()
_bound: weakref.WeakKeyDictionary[torch.nn.Module, list[dist.ProcessGroup]] = weakref.WeakKeyDictionary()


def build(layout: ParallelLayout, timeout: timedelta | None = None) -> None:
    """Create the process groups of ``layout``, or keep them if they exist.

    Groups of another layout are destroyed first. ``rebind`` gives the new groups to a model that was built on
    destroyed ones.

    Args:
        layout: The parallel sizes; its world size is that of the default group.
        timeout: How long a collective may take; None keeps the present value.

    Raises:
        RuntimeError: The default group has another number of ranks than the layout.
    """
    state = _current()
    timeout = timeout or state.timeout
    if state.layout == layout and state.timeout == timeout and _are_in_use(state.groups):
        return
    if layout.world_size != dist.get_world_size():
        raise RuntimeError(
            f"The default process group has {dist.get_world_size()} ranks, and the layout has {layout.world_size}"
            f" ({layout.sizes}). Something else in this program has made it: call"
            " torch.distributed.destroy_process_group() first, or give the Trainer as many devices."
        )
    _destroy_layout_groups()
    state.timeout = timeout
    megatron_groups.create(layout, timeout)
    state.groups = megatron_groups.of_this_rank()
    _build_stacks(layout, timeout)
    _build_model_groups(layout, timeout)
    state.layout = layout


def set_timeout(timeout: timedelta) -> None:
    """Change how long a collective may take, in the groups that exist and in those that ``gloo_world`` creates later.

    The default group keeps its own. Sends and receives over Gloo keep the time that ``build`` was given (torch 2.13).
    """
    state = _current()
    state.timeout_now = timeout
    for group in (*state.groups, *_own_groups(state), *state.gloo):
        if _is_alive(group):
            group.set_timeout(timeout)


def rebind(model: torch.nn.Module) -> None:
    """Give layers of ``model`` the existing groups in place of destroyed ones of the same sizes, unless it has them."""
    groups = _current().groups
    if _bound.get(model) is groups:
        return
    _bound[model] = groups
    collection = ProcessGroupCollection.use_mpu_process_groups()
    for layer in model.modules():
        if hasattr(layer, "take_groups"):  # it holds them elsewhere, too
            layer.take_groups(collection)  # type: ignore[operator]
        for name, value in list(vars(layer).items()):
            if isinstance(value, ProcessGroupCollection):
                vars(layer)[name] = collection  # setattr of a module is slow
            elif isinstance(value, dist.ProcessGroup):  # tp_group, pp_group, ...
                vars(layer)[name] = getattr(collection, name.removesuffix("_group"), value)


def _current() -> _State:
    """The state, after forgetting groups that somebody else has destroyed."""
    if _state.world is not None and (not dist.is_initialized() or dist.group.WORLD is not _state.world()):
        megatron_groups.forget()
        _state.reset()
    if _state.world is None and dist.is_initialized():
        _state.world = weakref.ref(dist.group.WORLD)
    return _state


def _is_alive(group: dist.ProcessGroup) -> bool:
    """Whether a group has not been destroyed; private in torch (2.13), and used alike by megatron-core."""
    return group in dist.distributed_c10d._world.pg_map


def _are_in_use(groups: list[dist.ProcessGroup]) -> bool:
    """Whether megatron-core still works with these groups, and all of them are alive."""
    return (
        parallel_state.model_parallel_is_initialized()
        and parallel_state.get_model_parallel_group() in groups
        and all(map(_is_alive, groups))
    )


def _destroy_layout_groups() -> None:
    """Destroy the groups of the layout; the default group and the Gloo groups of all ranks stay."""
    state = _current()
    megatron_groups.forget()
    for group in (*state.groups, *_own_groups(state)):
        if _is_alive(group):
            dist.destroy_process_group(group)
    state.groups.clear()
    state.stacks.clear()
    state.model = state.model_over_gloo = None
    state.layout = None


def _own_groups(state: _State) -> list[dist.ProcessGroup]:
    """The groups of the layout that megatron-core has no name for."""
    of_replica = (state.model, state.model_over_gloo)
    return [*state.stacks.values(), *(group for group in of_replica if group is not None)]


def _build_stacks(layout: ParallelLayout, timeout: timedelta) -> None:
    """Create a group of the pipeline ranks that hold each stack's stages; every rank takes part in creating each."""
    split = layout.pipeline_split_rank
    if split is None:
        return
    stages: dict[Stack, range] = {"encoder": range(split), "decoder": range(split, layout.num_stages)}
    pipelines = [layout.group("pp", rank) for rank in range(layout.world_size // layout.pp)]  # pp is the slowest
    for name, numbers in stages.items():
        for ranks_of_pipeline in pipelines:
            ranks = sorted({ranks_of_pipeline[number % layout.pp] for number in numbers})
            group = dist.new_group(ranks, timeout=timeout)
            if dist.get_rank() in ranks:
                _state.stacks[name] = group


def _build_model_groups(layout: ParallelLayout, timeout: timedelta) -> None:
    """Create the groups of the ranks of each replica: megatron-core's has no context-parallel ranks (0.16.1)."""
    if layout.cp > 1:
        _state.model = _of_replica(layout, timeout, None)
    if layout.world_size > layout.dp and dist.get_backend() != "gloo":
        _state.model_over_gloo = _of_replica(layout, timeout, "gloo")


def _of_replica(layout: ParallelLayout, timeout: timedelta, backend: str | None) -> dist.ProcessGroup | None:
    """A new group of the ranks of this rank's replica; every rank takes part in creating each replica's."""
    own = None
    for replica in range(layout.dp):
        ranks = [rank for rank in range(layout.world_size) if layout.coordinates(rank).dp == replica]
        group = dist.new_group(ranks, timeout=timeout, backend=backend)
        if dist.get_rank() in ranks:
            own = group
    return own


def check_single_process() -> None:
    """Refuse to build an undivided model where this process is one of several.

    Raises:
        RuntimeError: This process is a rank of a larger run.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"An undivided model is built on one process, and this is one of {dist.get_world_size()} ranks. Inside a"
            " run, give the checkpoint to the Trainer (ckpt_path=). Outside of a run, call build(tp=..., pp=...) on all"
            " ranks."
        )


def default_device() -> torch.device:
    """This rank's GPU of its machine, or the CPU on a machine without a GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def init_default_group(device: torch.device) -> None:
    """Initialise the default group: with the ranks that torchrun has started, or with this process as the only rank."""
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = meeting.meet(rank, ranks, _DEFAULT_TIMEOUT)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
    else:
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)
        _current().made_for_build = True


def world_size() -> int:
    """Number of ranks of the default group."""
    return dist.get_world_size()


def destroy_if_made_for_build() -> None:
    """Destroy the groups that were made to build a model outside of a run: a run makes its own."""
    if _current().made_for_build:
        destroy()


def destroy() -> None:
    """Destroy all groups. A model that was built on them can be called again after ``build`` and ``rebind``."""
    if dist.is_initialized():
        _destroy_layout_groups()
        dist.destroy_process_group()
    megatron_groups.forget()
    _state.reset()


def coordinates() -> RankCoordinates:
    """The coordinates of this rank."""
    return RankCoordinates(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        shares_sequences=parallel_state.get_context_parallel_world_size() > 1,
    )


def seed(base: int) -> None:
    """Seed the model's random numbers from rank 0's ``base``, by Megatron's scheme.

    Tensor-parallel ranks, pipeline stages and context-parallel ranks get seeds of their own, data-parallel replicas the
    same ones. The generators that data loading draws from stay as the user seeded them.
    """
    shared = [base]
    dist.broadcast_object_list(shared, src=0)
    _state.seed = shared[0]
    with model_rng():
        stage, stages = pipeline().rank(), pipeline().size()
        part = context_parallel().rank() * stages + stage
        model_parallel_cuda_manual_seed(_state.seed % 2**31 + _SEED_STEP_OF_PIPELINE_STAGES * part)


def run_seed() -> int:
    """The seed that ``seed`` was last given by rank 0; the same on every rank."""
    return _state.seed


def data_parallel() -> dist.ProcessGroup:
    """The group of the ranks that hold the same weights, over which losses and gradients are summed.

    They compute different tokens: those of different replicas other rows, and those of one replica (context
    parallelism) other parts of the same rows.
    """
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def replicas() -> dist.ProcessGroup:
    """The group of the ranks that read different data: one of each replica, with the same part of the rows."""
    return parallel_state.get_data_parallel_group()


def context_parallel() -> dist.ProcessGroup:
    """The group of the ranks that hold the same weights and share the tokens of each row."""
    return parallel_state.get_context_parallel_group()


def model_parallel() -> dist.ProcessGroup:
    """The group of the ranks of one replica: they hold one copy of the model together, and read the same data.

    Under context parallelism they are several copies, which share the tokens of each row.
    """
    return parallel_state.get_model_parallel_group() if _state.model is None else _state.model


def model_parallel_over_gloo() -> dist.ProcessGroup:
    """Like ``model_parallel``, for what the hosts of a replica tell one another without waiting for their devices."""
    return model_parallel() if _state.model_over_gloo is None else _state.model_over_gloo


def one_copy() -> dist.ProcessGroup:
    """The group of the ranks that hold one copy of the dense weights together; without those that share its rows."""
    return parallel_state.get_model_parallel_group()


def tensor_parallel() -> dist.ProcessGroup:
    """The group of the ranks that share each layer."""
    return parallel_state.get_tensor_model_parallel_group()


def stage() -> dist.ProcessGroup:
    """The group of the ranks of a pipeline stage: each has other tokens of the global batch, or holds copies of them.

    The ranks of a replica's tensor-parallel group have other tokens under sequence parallelism only.
    """
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def expert_model_parallel() -> dist.ProcessGroup:
    """The group of the ranks that hold one copy of all experts together."""
    return parallel_state.get_expert_tensor_model_pipeline_parallel_group()


def expert_tensor_parallel() -> dist.ProcessGroup:
    """The group of the ranks that share each expert."""
    return parallel_state.get_expert_tensor_parallel_group()


def pipeline() -> dist.ProcessGroup:
    """The group of the pipeline stages of one copy of the model."""
    return parallel_state.get_pipeline_model_parallel_group()


def pipeline_ends() -> dist.ProcessGroup:
    """The group of the first and the last pipeline stage of one copy of the model; this rank is one of them."""
    return parallel_state.get_embedding_group()


def stack(name: Stack) -> dist.ProcessGroup:
    """The group of the pipeline ranks that hold stages of the encoder, or of the decoder; this rank is one of them."""
    return _state.stacks[name]


def gloo_world() -> dist.ProcessGroup:
    """The group of all ranks over Gloo, for Python objects and tensors in host memory.

    It is created at the first call, which every rank makes.
    """
    return _gloo_groups()[0]


def gloo_background() -> dist.ProcessGroup:
    """Like ``gloo_world``, for the thread that writes checkpoints: on one group, two threads would mix messages up."""
    return _gloo_groups()[1]


def _gloo_groups() -> tuple[dist.ProcessGroup, ...]:
    state = _current()
    if not state.gloo or not all(map(_is_alive, state.gloo)):
        timeout = state.timeout_now or state.timeout
        state.gloo = tuple(dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return state.gloo
