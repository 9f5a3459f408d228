"""All patches that let megatron-core run without CUDA; ``use_device`` applies and undoes them.

How: megatron-core's own modules (``_MODULES``) are given another module under their global name ``torch``: a copy of
torch's namespace in which ``cuda`` answers for the CPU and four factory functions take ``device="cuda"`` to mean the
CPU. Look-ups cost what they cost before, and torch itself, as everybody else sees it, is left alone, but for
``torch.Tensor.type`` and ``torch.Tensor.cuda`` while the functions run that are said below to call them.

What is replaced, and why:

======================================================  ==============================================================
``torch.cuda`` in ``_MODULES``                         ``current_device()`` is passed as ``device=`` all over;
                                                       ``synchronize``, ``empty_cache``, streams and the RNG are
                                                       called without asking whether there is a GPU
``torch.zeros/ones/tensor/empty`` in ``_MODULES``      the literal ``device="cuda"`` (token counter of the schedules,
                                                       ``found_inf`` and scales of the optimizers)
``tensor_parallel.random._get/_set_cuda_rng_state``    they reach into ``torch.cuda.default_generators``
``DistributedOptimizer.__init__``,                     compare ``param.type()`` with "torch.cuda.FloatTensor" and its
``Float16OptimizerWithFloat16Params.__init__``         kin: the comparison is answered as on a GPU while they run
``LanguageModule.setup_embeddings_and_output_layer``   calls ``weight.data.cuda()`` for tied embeddings
``DynamicGradScaler/ConstantGradScaler.load_state_dict``  calls ``.cuda()`` on the loaded scale
``schedules.deallocate_output_tensor``,                a stage's output is freed when it is sent, while Gloo still
``schedules.custom_backward``                          reads it: NaN and wrong gradients. CUDA's streams keep the order
``p2p_communication._p2p_ops``                         a message over Gloo is lost when its handle goes before the peer
                                                       has asked for it, as the last of an interleaved schedule's do
``param_and_grad_buffer._coalescing_manager`` and the   torch joins what is coalesced in Gloo's threads, a path that has
collectives inside of it                                crashed there, and gains nothing: they run one by one, and
                                                       handles and tensors are held until they are waited for; a rank
                                                       alone in its group runs none, where Gloo would copy every byte
``rotary_pos_embedding.get_pos_emb_on_this_cp_rank``   takes the places of the rank's chunks from pinned memory
``MoEAlltoAllTokenDispatcher._maybe_dtoh_…``           moves the sizes of messages to the host on a stream of its own;
                                                       Gloo takes them as lists
``mappings._gather_along_first_dim``,                   gather parts of different sizes, of ranks that share experts,
``mappings._reduce_scatter_along_first_dim``            and sum them: Gloo takes parts of one size
``tensor_parallel.random.logging``                     warns at every fork that the CPU's random state has changed
``tensor_parallel.random._get_share_storage``          compiles C++ for recomputed outputs (from 0.17 on), for which a
                                                       CPU needs a compiler, and seconds; the bytes are copied instead
======================================================  ==============================================================
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_MODULES = (
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "models.common.embeddings.rotary_pos_embedding",
    "models.common.language_module.language_module",
    "models.gpt.gpt_model",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "parallel_state",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.data",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "transformer.attention",
    "transformer.dot_product_attention",
    "transformer.moe.moe_utils",
    "transformer.moe.router",
    "transformer.moe.shared_experts",
    "transformer.moe.token_dispatcher",
    "transformer.transformer_layer",
    "transformer.utils",
    "utils",
)
_CPU = torch.device("cpu")
# A schedule waits for all of its messages but the last in each direction; the peer takes those before it goes on.
_HANDLES_KEPT = 8

_undo: list[Callable[[], None]] = []
_model_state: torch.Tensor | None = None


def bend() -> None:
    """Make megatron-core run on the CPU, over Gloo."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.models.common.embeddings import rotary_pos_embedding
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import distrib_optimizer, grad_scaler, optimizer
    from megatron.core.pipeline_parallel import p2p_communication, schedules
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    torch_on_cpu = _torch_on_cpu()
    for name in _MODULES:
        _replace(importlib.import_module(f"megatron.core.{name}"), "torch", torch_on_cpu)
    _replace(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    _replace(random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))

    _replace(random, "logging", SimpleNamespace(getLogger=lambda _: SimpleNamespace(warning=_nothing)))
    if hasattr(random, "_get_share_storage"):
        _replace(random, "_get_share_storage", lambda: _copy_storage)

    _replace(distrib_optimizer.DistributedOptimizer, "__init__", _answering_as_cuda)
    _replace(optimizer.Float16OptimizerWithFloat16Params, "__init__", _answering_as_cuda)

    _replace(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", _part_of_table)

    _replace(schedules, "deallocate_output_tensor", _nothing)
    _replace(schedules, "custom_backward", _backward)
    _replace(p2p_communication, "_p2p_ops", _keeping_handles)

    torch_there = _like(
        torch_on_cpu, distributed=_like(torch.distributed, all_reduce=_kept_until_waited(torch.distributed.all_reduce))
    )
    _replace(param_and_grad_buffer, "torch", torch_there)
    _replace(param_and_grad_buffer, "_coalescing_manager", _OneByOne)
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        _replace(param_and_grad_buffer, name, _kept_until_waited)

    _replace(mappings, "_gather_along_first_dim", _gathering_any_sizes)
    _replace(mappings, "_reduce_scatter_along_first_dim", _scattering_any_sizes)
    _replace(MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", _sizes_as_lists)

    _replace(LanguageModule, "setup_embeddings_and_output_layer", _staying_on_cpu)
    for scaler in (grad_scaler.DynamicGradScaler, grad_scaler.ConstantGradScaler):
        _replace(scaler, "load_state_dict", _staying_on_cpu)


def unbend() -> None:
    """Undo everything that :func:`bend` changed, and nothing else."""
    while _undo:
        _undo.pop()()


@contextmanager
def model_rng() -> Iterator[None]:
    """Run the body with the model's random state, and restore the data's afterwards."""
    global _model_state
    data_state = torch.get_rng_state()
    if _model_state is not None:
        torch.set_rng_state(_model_state)
    try:
        yield
    finally:
        _model_state = torch.get_rng_state()
        torch.set_rng_state(data_state)


def _replace(owner: Any, name: str, new: Any) -> None:
    """Set ``owner.name`` to ``new``; if ``new`` is a decorator of this file, to the decorated old value."""
    old = getattr(owner, name)
    setattr(owner, name, new(old) if new in _DECORATORS else new)
    _undo.append(lambda: setattr(owner, name, old))


def _torch_on_cpu() -> ModuleType:
    """A module like torch, in which CUDA means the CPU."""
    factories = {name: _cuda_means_cpu(getattr(torch, name)) for name in ("zeros", "ones", "tensor", "empty")}
    return _like(torch, cuda=_cuda_for_cpu(), **factories)


def _like(module: ModuleType, **changes: Any) -> ModuleType:
    """A copy of ``module``'s namespace with ``changes``."""
    namespace = ModuleType(module.__name__)
    namespace.__dict__.update(module.__dict__)
    namespace.__dict__["__getattr__"] = lambda name: getattr(module, name)  # for attributes that it loads lazily
    namespace.__dict__.update(changes)
    return namespace


def _cuda_for_cpu() -> SimpleNamespace:
    """The functions of ``torch.cuda`` that megatron-core calls in training, for the CPU; others raise as usual."""
    names = {name: value for name, value in vars(torch.cuda).items() if not name.startswith("__")}
    names.update(
        current_device=lambda: _CPU,
        synchronize=_nothing,
        empty_cache=_nothing,
        current_stream=_no_stream,
        default_stream=_no_stream,
        Stream=_no_stream,
        stream=lambda *_: nullcontext(),
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
    )
    return SimpleNamespace(**names)


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for functions that do nothing on the CPU, such as waiting for a stream."""


def _no_stream(*_: Any, **__: Any) -> SimpleNamespace:
    """Stands for a stream: on the CPU, all is done in the order in which it is written."""
    return SimpleNamespace(wait_stream=_nothing, wait_event=_nothing, record_event=_nothing, synchronize=_nothing)


def _copy_storage(to: torch.Tensor, source: torch.Tensor) -> None:
    """Give a tensor whose storage was freed the bytes of another, and all views of it."""
    storage, recomputed = to.untyped_storage(), source.untyped_storage()
    storage.resize_(recomputed.size())
    storage.copy_(recomputed)


def _sizes_as_lists(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """Give a dispatcher of experts' tokens the sizes of its messages as lists, where a GPU sends them to the host."""
    if point == dispatcher.cuda_dtoh_point and not dispatcher.drop_and_pad:
        for name in ("input_splits", "output_splits"):
            if isinstance(sizes := getattr(dispatcher, name), torch.Tensor):
                setattr(dispatcher, name, sizes.tolist())
    return tokens_per_expert


def _gathering_any_sizes(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Run ``function``, or where the ranks' parts differ in size, send each part to all ranks."""

    @functools.wraps(function)
    def call(part: torch.Tensor, group: Any, output_split_sizes: Any = None, *rest: Any) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return function(part, group, output_split_sizes, *rest)
        parts = [part.new_empty(size, *part.shape[1:]) for size in output_split_sizes]
        parts[group.rank()].copy_(part)
        for rank, each in enumerate(parts):
            torch.distributed.broadcast(each, torch.distributed.get_global_rank(group, rank), group=group)
        return torch.cat(parts)

    return call


def _scattering_any_sizes(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Run ``function``, or where the ranks' parts differ in size, sum all parts on all ranks, and keep one."""

    @functools.wraps(function)
    def call(parts: torch.Tensor, group: Any, input_split_sizes: Any = None, *rest: Any) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return function(parts, group, input_split_sizes, *rest)
        summed = parts.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed, group=group)
        return summed.split(input_split_sizes)[group.rank()].clone()

    return call


def _backward(output: torch.Tensor, grad_output: torch.Tensor | None) -> None:
    torch.autograd.backward(output, grad_tensors=grad_output)


def _part_of_table(table: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """The entries of a table of positions at which a context-parallel rank has tokens, zig-zag."""
    chunks = table.chunk(2 * group.size(), dim)
    return torch.cat([chunks[group.rank()], chunks[-1 - group.rank()]], dim)


def _cuda_means_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device=_CPU if device == "cuda" else device, **kwargs)

    return make


def _answering_as_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` while ``tensor.type()`` names the CUDA type of the same dtype."""
    tensor_type = torch.Tensor.type

    def cuda_type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return tensor_type(tensor, dtype, *args, **kwargs)
        name = tensor_type(tensor)  # inside a device context, the name is changed already
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        torch.Tensor.type = cuda_type  # type: ignore[assignment,method-assign]
        try:
            return function(*args, **kwargs)
        finally:
            del torch.Tensor.type  # the inherited method is used again

    return call


def _staying_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` while ``tensor.cuda()`` gives the tensor itself."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
        try:
            return function(*args, **kwargs)
        finally:
            del torch.Tensor.cuda

    return call


def _keeping_handles(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Run ``function``, which starts messages, and keep their handles alive for a while."""
    kept: deque[Any] = deque(maxlen=_HANDLES_KEPT)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
        handles = function(*args, **kwargs)
        kept.extend(handles.values())
        return handles

    return call


class _OneByOne:
    """Replaces torch's ``_coalescing_manager``: the collectives inside start immediately, each on its own.

    It is also the handle of all these collectives. If they are synchronous, they are finished, and it is empty.
    """

    within: _OneByOne | None = None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.works: list[tuple[Any, Any]] = []  # each handle with the tensors that it reads and writes

    def __enter__(self) -> _OneByOne:
        _OneByOne.within = self
        return self

    def __exit__(self, *_: Any) -> None:
        _OneByOne.within = None

    def wait(self) -> None:
        while self.works:
            self.works[0][0].wait()
            del self.works[0]


def _kept_until_waited(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``collective``, and keep its handle and tensors in the surrounding ``_OneByOne``.

    A rank that is alone in its group has the sum of a buffer there already, and runs nothing. If torch (2.13) marks
    ``collective`` as deprecated, the undecorated function is run: a user may have made warnings errors.
    """
    function = inspect.unwrap(collective)

    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs["group"].size() == 1 and len({tensor.data_ptr() for tensor in args}) == 1:
            return None
        work = function(*args, **kwargs)
        if work is not None and _OneByOne.within is not None:
            _OneByOne.within.works.append((work, (args, kwargs)))
        return work

    return call


_DECORATORS = (
    _gathering_any_sizes,
    _scattering_any_sizes,
    _answering_as_cuda,
    _staying_on_cpu,
    _keeping_handles,
    _kept_until_waited,
)
