"""Replaces the parts of a layer spec by their fused counterparts."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec

from lightning_megatron.distributed.megatron_versions import dense_mlp_submodules
from lightning_megatron.models.layers.fused.activation import FusedActivation, FusedMLP
from lightning_megatron.models.layers.fused.residual import FusedNorm, fused_bias_dropout_add
from lightning_megatron.models.layers.fused.rotary import FusedRotation
from lightning_megatron.models.layers.fused.transformer_layer import FusedLayer
from lightning_megatron.models.layers.norm import TorchNorm
from lightning_megatron.models.layers.recomputation import RecomputedMLP


def fuse(layer: ModuleSpec, rotates: bool = False) -> None:
    """Change the spec of a layer; parts of other kinds than those of a dense layer stay as they are.

    Args:
        layer: A layer with torch's norms.
        rotates: Whether its self-attention rotates queries and keys by a table; see ``FusedRotation``.
    """
    parts = layer.submodules
    for name in ("input_layernorm", "pre_cross_attn_layernorm", "pre_mlp_layernorm"):
        if getattr(parts, name) is TorchNorm:
            setattr(parts, name, FusedNorm)
    for name in ("self_attn_bda", "cross_attn_bda", "mlp_bda"):
        if getattr(parts, name) is get_bias_dropout_add:
            setattr(parts, name, fused_bias_dropout_add)
    if (mlp := dense_mlp_submodules(layer)) is not None:
        parts.mlp = _joined(FusedMLP, submodules=mlp)
    elif parts.mlp is RecomputedMLP:
        parts.mlp = type("RecomputedMLP", (FusedActivation, RecomputedMLP), {})
    if rotates:
        attention = parts.self_attention
        attention.module = type("FusedRotation", (FusedRotation, attention.module), {})
    layer.module = type("FusedLayer", (FusedLayer, layer.module), {})


def _joined(module: type, **arguments: object) -> type:
    """``module`` with arguments given, since megatron-core warns of specs of classes that it does not know."""
    initialise: Any = module.__init__  # type: ignore[misc]
    return type(module.__name__, (module,), {"__init__": partialmethod(initialise, **arguments)})
