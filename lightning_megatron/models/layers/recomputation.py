"""Frees the outputs of norms and activations after the forward pass, and computes them again in the backward pass.

Both are cheap to compute, and kept only because the linear layer behind them needs its input for its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, checkpoint
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from typing_extensions import override

from lightning_megatron.distributed import process_groups


class RecomputedMLP(MLP):
    """megatron-core's feed-forward layer, which keeps its input alone, or that of its activation beside it.

    megatron-core's own recomputation of the whole layer does not end where the layer has biases: the bias that it
    returns becomes an output of the checkpoint, and the recomputed one is that same output.

    Args:
        config: Megatron's transformer configuration.
        **_: Arguments that megatron-core gives to layers of other kinds.
    """

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=process_groups.tensor_parallel(),
        )

    @override
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on ``[s/tp, b, h]``; the output and the bias that is to be added."""
        if not (self.training and torch.is_grad_enabled()):
            return self._run(hidden_states)
        if recomputes(self.config, "whole_mlp"):
            return checkpoint(lambda hidden: self._run(hidden)[0], False, hidden_states), self.linear_fc2.bias
        inputs, bias = self.linear_fc1(hidden_states)  # [s, b, ffn/tp], of gated layers twice as wide
        activation = CheckpointWithoutOutput(fp8=None)  # its default, False, asks for Transformer Engine
        output, output_bias = self.linear_fc2(activation.checkpoint(self.activate, inputs, bias))
        activation.discard_output_and_register_recompute(output)
        return output, output_bias

    def _run(self, hidden_states: torch.Tensor) -> Any:
        return self.linear_fc2(self.activate(*self.linear_fc1(hidden_states)))

    def activate(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The bias and the activation, ``[s, b, ffn/tp]``."""
        return activated(self.config, inputs if bias is None else inputs + bias)


def activated(config: TransformerConfig, hidden: torch.Tensor) -> torch.Tensor:
    """A feed-forward layer's activation, ``[..., ffn/tp]``; a gated layer's ``hidden`` is twice as wide."""
    function: Any = config.activation_func
    if not config.gated_linear_unit:
        return function(hidden)
    gate, linear = hidden.chunk(2, dim=-1)
    if (limit := config.activation_func_clamp_value) is not None:
        gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
    if config.glu_linear_offset:
        linear = linear + config.glu_linear_offset
    return function(gate) * linear


def recompute_norms(model: torch.nn.Module) -> None:
    """Where "layernorm" is recomputed, free the output of each layer's norms until the backward pass needs it.

    The output of the last norm of a post-LayerNorm stack stays, which leaves the stack.

    Args:
        model: A chunk with megatron-core's transformer blocks.
    """
    for block in model.modules():
        if isinstance(block, TransformerBlock) and recomputes(block.config, "norm_output"):
            for norm, user in _norms_and_users(list(block.layers)):
                _Refilled(norm, user)


def use_recomputed_mlp(layer: ModuleSpec, config: TransformerConfig) -> None:
    """Give a layer's spec the feed-forward layer that recomputes, where one is asked for."""
    if recomputes(config, "mlp_act") or recomputes(config, "whole_mlp"):
        layer.submodules.mlp = RecomputedMLP


def recomputes(config: TransformerConfig, module: str) -> bool:
    """Whether the activations of ``module`` are computed again."""
    return config.recompute_granularity == "selective" and module in (config.recompute_modules or ())


def _norms_and_users(layers: list[TransformerLayer]) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """Each norm, and the last module of the forward pass that reads its output."""
    behind: torch.nn.Module | None = None  # the norm behind the residual sum before, of post-LayerNorm models
    for layer in layers:
        for norm, user in (
            (layer.input_layernorm, layer.mlp if getattr(layer, "shares_norm", False) else layer.self_attention),
            (layer.pre_cross_attn_layernorm, layer.cross_attention),
            (layer.pre_mlp_layernorm, layer.mlp),
        ):
            if not isinstance(norm, IdentityOp):
                yield norm, user
        for added in (layer.self_attn_bda, layer.mlp_bda):
            norm = getattr(added, "layer_norm", None)
            if norm is not None:
                if behind is not None:
                    yield behind, norm
                behind = norm


class _Refilled:
    """Frees a module's output once another one has read it, and fills it again when the other's gradient comes.

    What is in between saves the output for its backward pass, and all that happens there comes after that gradient.
    """

    def __init__(self, module: torch.nn.Module, user: torch.nn.Module) -> None:
        self.module = module
        self.made: tuple[torch.Tensor, torch.Tensor] | None = None  # the module's input and output
        module.register_forward_hook(self._note)
        user.register_forward_hook(self._free)

    def _note(self, _: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self.made = (inputs[0], output) if output.requires_grad else None

    def _free(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        if self.made is None:
            return
        (source, freed), self.made = self.made, None
        read = output[0] if isinstance(output, tuple) else output
        if not read.requires_grad:
            return
        storage = freed.untyped_storage()
        module = self.module

        def refill(_: torch.Tensor) -> None:
            with torch.no_grad():
                again = module.forward(source).untyped_storage()
            storage.resize_(again.nbytes())
            storage.copy_(again)

        storage.resize_(0)
        read.register_hook(refill)
