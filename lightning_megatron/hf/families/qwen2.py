"""Qwen 2 and 2.5: Llama's shape, with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import layer_types
from lightning_megatron.hf.families.llama import Llama


class Qwen2(Llama):
    """Some layers may have a window of attention."""

    model_type = "qwen2"

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        return {"bias": False, "qkv_bias": True, **layer_types.read(fields)}

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, bias=(False,), qkv_bias=(True,), extra=({},))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        return layer_types.written(config)
