"""Adds the products that are the gradients of weights to megatron-core's gradient buffers, without a tensor between.

megatron-core's linear layers can do so with Apex's CUDA extension. Here torch's own matrix product does it, on any
device. What else reaches a weight's gradient (a tied embedding, a penalty on the weights) is added as always.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers

from lightning_megatron.distributed.megatron_versions import linear_function_tail

_ACCEPTS = "accepts_products"  # a weight has this attribute while its `main_grad` is trained on


def accept_products(weights: Iterable[torch.nn.Parameter]) -> None:
    """Allow products to be added to the ``main_grad`` of ``weights``, until ``refuse_products`` is called."""
    for weight in weights:
        setattr(weight, _ACCEPTS, True)


def refuse_products(weights: Iterable[torch.nn.Parameter]) -> None:
    """Let the gradients of ``weights`` come as tensors again."""
    for weight in weights:
        weight.__dict__.pop(_ACCEPTS, None)


def takes_product(weight: torch.Tensor) -> bool:
    """Whether the gradient of ``weight`` may be added to its ``main_grad`` by :func:`add_product`.

    Not in a run without gradient buffers, where a hook of the user waits for the gradient, and where the device has no
    product of these types: on the CPU, one of bf16 weights into an fp32 buffer is slower than an addition.
    """
    if not (weight.requires_grad and torch.is_grad_enabled() and hasattr(weight, _ACCEPTS)):
        return False
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:  # private in torch (2.13)
        return False
    main_grad = weight.main_grad  # type: ignore[attr-defined]
    if weight.dtype == main_grad.dtype:
        return True
    # One row of fp32 from bf16 goes another way through torch (2.13), and is not added to what is there.
    return weight.is_cuda and weight.size(0) > 1 and device_adds(weight.device, weight.dtype)


def add_product(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """Add a linear layer's weight gradient to ``main_grad``, summed in fp32.

    Args:
        inputs: The layer's inputs, ``[tokens, in]``.
        grad_output: The gradient of its outputs, ``[tokens, out]``, of the same type.
        main_grad: ``[out, in]``.
    """
    if main_grad.dtype == inputs.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    else:
        torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)


def fuse(model: torch.nn.Module) -> None:
    """Make the parallel linear layers of ``model`` add their weight gradients to the buffers where they can."""
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=add_product, wgrad_gemm_accum_fp16=add_product
    )
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module._forward_impl = _linear
        elif hasattr(module, "adds_products"):  # experts, which ask `takes_product` themselves
            module.adds_products = True  # type: ignore[assignment]


def _linear(input: torch.Tensor, weight: torch.nn.Parameter, **options: Any) -> Any:
    """The forward pass of a parallel linear layer, with megatron-core's arguments."""
    if not weight.requires_grad:
        return layers.linear_with_frozen_weight(input, weight, **options)
    if not takes_product(weight):
        return layers.linear_with_grad_accumulation_and_async_allreduce(input, weight, **options)
    return _AddingProducts.apply(
        input, weight, options["bias"], True, options["allreduce_dgrad"], options["sequence_parallel"], None, None,
        options["tp_group"], *linear_function_tail(options),
    )  # fmt: skip


class _AddingProducts(layers.LinearWithGradAccumulationAndAsyncCommunication):
    """megatron-core's linear function; autograd gets no gradient of the weight, not even a stand-in for it."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.nn.Parameter, *options: Any) -> torch.Tensor:
        ctx.weight = weight
        return layers.LinearWithGradAccumulationAndAsyncCommunication.forward(ctx, input, weight, *options)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        # megatron-core gives a weight with this attribute a stand-in of any content, and its hook then ignores what
        # else came with it. Without a stand-in, the hook adds all that comes.
        del ctx.weight.grad_added_to_main_grad
        try:
            return layers.LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, grad_output)
        finally:
            ctx.weight.grad_added_to_main_grad = False


@functools.cache
def device_adds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of ``dtype`` to fp32 on ``device``; it is tried once (torch 2.8 cannot)."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = ones.float()
    try:
        add_product(ones, ones, total)
    except (RuntimeError, TypeError) as error:
        rank_zero_warn(
            f"Kernels(fused_weight_gradients=True): torch {torch.__version__} cannot add a product of {dtype} to fp32"
            f" on {device} ({str(error).splitlines()[0]}). Weight gradients are computed first and added then."
        )
        return False
    return bool((total == 17).all())
