"""Qwen 1.5 and 2 with experts (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): one more expert serves all tokens, behind a gate."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import layer_types, sparse_layers
from lightning_megatron.hf.families.mixture import Mixture
from lightning_megatron.hf.weight_mapping import Stacked


class Qwen2Moe(Mixture):
    """Some layers may have a window of attention, and some no experts."""

    model_type = "qwen2_moe"

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        shared = {"shared_ffn_hidden_size": fields("shared_expert_intermediate_size"), "shared_gate": True}
        return {
            "bias": False,
            "qkv_bias": fields("qkv_bias"),
            **layer_types.read(fields),
            "experts": self.read_experts(fields, "num_experts", **sparse_layers.read(fields), **shared),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, bias=(False,), extra=({},), hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        experts = self.write_experts(config, "num_experts")
        self._require(config.experts, shared_gate=(True,))
        return {
            **experts,
            **sparse_layers.written(config),
            **layer_types.written(config),
            "shared_expert_intermediate_size": config.experts.shared_ffn_hidden_size,
            "qkv_bias": bool(config.qkv_bias),
        }

    @override
    def expert_layer(self, ours: str, theirs: str, config: Any) -> dict[str, Any]:
        shared = f"{theirs}shared_expert."
        return {
            **super().expert_layer(ours, theirs, config),
            f"{ours}shared_experts.linear_fc1.weight": Stacked(
                (f"{shared}gate_proj.weight", f"{shared}up_proj.weight")
            ),
            f"{ours}shared_experts.linear_fc2.weight": f"{shared}down_proj.weight",
            f"{ours}shared_experts.gate_weight": f"{theirs}shared_expert_gate.weight",
        }
