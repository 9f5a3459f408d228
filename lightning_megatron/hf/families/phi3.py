"""Phi-3 and Phi-4: Llama's shape, its projections stored together."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.llama import Llama
from lightning_megatron.hf.weight_mapping import FusedQueryKeyValue


class Phi3(Llama):
    """Queries, keys and values are one tensor, and so are the gate and what it gates."""

    model_type = "phi3"
    partial_rotary = True

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        fields("original_max_position_embeddings")  # of kinds of scaling that `rotary` refuses
        return {
            "bias": False,
            "hidden_dropout": fields.same("resid_pdrop", "embd_pdrop"),
            "sliding_window": fields("sliding_window"),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, bias=(False,), qkv_bias=(None, False), extra=({},), sliding_window_layers=(None,))
        self._require(config, rope_scaling=(None,), embedding_multiplier=(1.0,))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        dropout = config.hidden_dropout
        return {"resid_pdrop": dropout, "embd_pdrop": dropout, "sliding_window": config.sliding_window}

    @override
    def linear_layers(self, ours: str, theirs: str, kind: str) -> dict[str, Any]:
        return {
            f"{ours}self_attention.linear_qkv.{kind}": FusedQueryKeyValue(f"{theirs}self_attn.qkv_proj.{kind}"),
            f"{ours}self_attention.linear_proj.{kind}": f"{theirs}self_attn.o_proj.{kind}",
            f"{ours}mlp.linear_fc1.{kind}": f"{theirs}mlp.gate_up_proj.{kind}",
            f"{ours}mlp.linear_fc2.{kind}": f"{theirs}mlp.down_proj.{kind}",
        }
