"""Mistral: Llama's shape, and a window of attention."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.llama import Llama


class Mistral(Llama):
    """A token looks back no further than the window, in every layer."""

    model_type = "mistral"

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        return {"bias": False, "sliding_window": fields("sliding_window")}

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, bias=(False,), qkv_bias=(None, False), extra=({},), sliding_window_layers=(None,))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        return {"sliding_window": config.sliding_window}
