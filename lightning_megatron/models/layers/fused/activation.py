"""Bias and activation of the feed-forward layer in one kernel, gated or not; the backward pass needs the input only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from lightning_megatron.models.layers.fused.compiled import compiled

Function = Callable[..., Any]


class FusedActivation:
    """The bias and activation of a feed-forward layer, in one kernel."""

    config: TransformerConfig

    def activate(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``[s, b, ffn/tp]`` of the same, or of twice as many channels if the activation is gated."""
        clamp, offset = self.config.activation_func_clamp_value, self.config.glu_linear_offset
        activation = _formula(self.config.activation_func, self.config.gated_linear_unit, clamp, offset)
        return biased_activation(inputs, bias, activation)


class FusedMLP(FusedActivation, MLP):
    """megatron-core's feed-forward layer, with bias and activation in one kernel.

    Args:
        config: Megatron's transformer configuration.
        submodules: The two linear layers.
        **_: Arguments that megatron-core gives to layers of other kinds.
    """

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, **_: Any) -> None:
        group = parallel_state.get_tensor_model_parallel_group()
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=group)

    def forward(self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **rest: Any) -> Any:
        """``[s/tp, b, h]`` to the same shape, and the bias that is still to be added."""
        evaluating = not (self.training or torch.is_grad_enabled())  # as for one token in generation
        if per_token_scale is not None or evaluating:
            return super().forward(hidden_states, per_token_scale, **rest)
        return self.linear_fc2(self.activate(*self.linear_fc1(hidden_states)))


def biased_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: Function) -> torch.Tensor:
    """``activation(x + bias)``.

    Args:
        x: ``[..., width]``.
        bias: ``[width]``, or None.
        activation: A function of tensors ``[tokens, width]``, differentiable.
    """
    return _BiasedActivation.apply(x, bias, *_kernels(activation))  # type: ignore[no-untyped-call]


class _BiasedActivation(torch.autograd.Function):
    """Saves its input, from which the backward pass computes the activation's derivative anew."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, run: Function, pull: Function) -> torch.Tensor:
        ctx.save_for_backward(x, bias)
        ctx.pull = pull
        out = run(x.reshape(-1, x.size(-1)), bias)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, bias = ctx.saved_tensors
        (gradient,) = gradients
        flat = gradient.reshape(-1, gradient.size(-1))
        of_x, of_bias = ctx.pull(flat, x.reshape(-1, x.size(-1)), bias, ctx.needs_input_grad[1])
        return of_x.view_as(x), of_bias, None, None


@functools.cache
def _formula(function: Function, gated: bool, clamp: float | None, offset: float) -> Function:
    """The activation as megatron-core defines it, of both halves of the width if it is gated."""
    if not gated:
        return function

    def gate(x: torch.Tensor) -> torch.Tensor:
        gate, linear = x.chunk(2, dim=-1)
        if clamp is not None:
            gate, linear = gate.clamp(max=clamp), linear.clamp(min=-clamp, max=clamp)
        return function(gate) * (linear + offset)

    return gate


@functools.cache
def _kernels(activation: Function) -> tuple[Function, Function]:
    """The compiled forward and backward pass."""

    def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return activation(x if bias is None else x + bias)

    def pull(gradient: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, of_bias: bool) -> Any:
        _, backward, *_ = torch.func.vjp(activation, x if bias is None else x + bias)
        (of_x,) = backward(gradient)
        return of_x, of_x.sum(0) if of_bias else None

    return compiled(run), compiled(pull)
