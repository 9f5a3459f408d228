"""Gemma (the first): Llama's shape, scaled embeddings and norms whose weights are counted from one."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.llama import Llama

_NORMS = {"layernorm_zero_centered_gamma": True}


class Gemma(Llama):
    """Embeddings are multiplied by the root of their width."""

    model_type = "gemma"

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("use_bidirectional_attention", None, False)
        return {
            "bias": fields.must_be("attention_bias", False),
            "embedding_multiplier": fields("hidden_size") ** 0.5,
            "extra": dict(_NORMS),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, bias=(False,), qkv_bias=(None, False), extra=(_NORMS,), sliding_window=(None,))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(config.hidden_size**0.5,))
        return {"attention_bias": False}
