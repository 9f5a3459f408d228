"""Qwen 3 with experts (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen 3's shape, with experts in some layers or all."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import sparse_layers
from lightning_megatron.hf.families.mixture import Mixture

_NORMED = {"qk_layernorm": True}


class Qwen3Moe(Mixture):
    """A norm on each query and key; a token may look back no further than a window, in every layer."""

    model_type = "qwen3_moe"

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        fields("use_sliding_window")  # without which transformers has emptied `sliding_window`
        return {
            "bias": fields.must_be("attention_bias", False),
            "extra": dict(_NORMED),
            "sliding_window": fields("sliding_window"),
            "experts": self.read_experts(fields, "num_experts", **sparse_layers.read(fields)),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, bias=(False,), qkv_bias=(None, False), extra=(_NORMED,), sliding_window_layers=(None,))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        experts = self.write_experts(config, "num_experts")
        self._require(config.experts, shared_ffn_hidden_size=(None,))
        return {
            **experts,
            **sparse_layers.written(config),
            "attention_bias": False,
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
        }
