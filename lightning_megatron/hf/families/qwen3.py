"""Qwen 3: Llama's shape, with a norm on each query and key."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import layer_types
from lightning_megatron.hf.families.llama import Llama

_NORMED = {"qk_layernorm": True}


class Qwen3(Llama):
    """Some layers may have a window of attention."""

    model_type = "qwen3"

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        return {"bias": fields.must_be("attention_bias", False), "extra": dict(_NORMED), **layer_types.read(fields)}

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, bias=(False,), qkv_bias=(None, False), extra=(_NORMED,))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        return {"attention_bias": False, **layer_types.written(config)}
