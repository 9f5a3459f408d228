"""GLM-4 of 2025 (GLM-4-0414): Llama's shape, with norms before and behind each block; it rotates neighbours."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.llama import Llama

_INTERLEAVED = {"rotary_interleaved": True}


class Glm4(Llama):
    """A part of each head is rotated; the gate and what it gates are one tensor."""

    model_type = "glm4"
    partial_rotary = True
    expresses = ("norm_placement",)
    norms = (
        ("input_layernorm", "input_layernorm"),
        ("post_self_attn_layernorm", "post_self_attn_layernorm"),
        ("pre_mlp_layernorm", "post_attention_layernorm"),
        ("post_mlp_layernorm", "post_mlp_layernorm"),
    )

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        return {
            "bias": False,
            "qkv_bias": fields("attention_bias"),
            "norm_placement": "sandwich",
            "extra": dict(_INTERLEAVED),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, norm_placement=("sandwich",), extra=(_INTERLEAVED,), bias=(False,))
        self._require(config, sliding_window=(None,), hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        return {"attention_bias": bool(config.qkv_bias)}

    @override
    def linear_layers(self, ours: str, theirs: str, kind: str) -> dict[str, Any]:
        layers = super().linear_layers(ours, theirs, kind)
        return {**layers, f"{ours}mlp.linear_fc1.{kind}": f"{theirs}mlp.gate_up_proj.{kind}"}
