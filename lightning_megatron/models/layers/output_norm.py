"""Norms on what attention and feed-forward layers put out, before it is added to the hidden states."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp

from lightning_megatron.models.layers.norm import TorchNorm

OutputAndBias = tuple[torch.Tensor, torch.Tensor | None]


def norm_outputs(layers: Iterable[Any]) -> None:
    """Give transformer layers such norms, ``post_self_attn_layernorm`` and ``post_mlp_layernorm``.

    megatron-core's layers add an output, its bias and the hidden states; the norm comes between.
    """
    for layer in layers:
        config = layer.config
        for place, name in ((layer.self_attention, "post_self_attn_layernorm"), (layer.mlp, "post_mlp_layernorm")):
            norm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)
            setattr(layer, name, norm)
            place.register_forward_hook(partial(_normed, norm))


def without_input_norms(layer: Any) -> None:
    """Take the norms before attention and feed-forward layer out of a layer's spec."""
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp


def _normed(norm: torch.nn.Module, _: torch.nn.Module, __: Any, output: OutputAndBias) -> OutputAndBias:
    hidden, bias = output
    return norm(hidden if bias is None else hidden + bias), None
