"""Mixtral: Mistral's shape, with experts in all layers."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.mixture import Mixture


class Mixtral(Mixture):
    """A token may look back no further than a window, in every layer."""

    model_type = "mixtral"
    normalized = True

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("router_jitter_noise", 0.0)
        return {
            "bias": False,
            "sliding_window": fields("sliding_window"),
            "experts": self.read_experts(fields, "num_local_experts"),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, bias=(False,), qkv_bias=(None, False), extra=({},), sliding_window_layers=(None,))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        return {
            **self.write_experts(config, "num_local_experts"),
            "intermediate_size": self.width_of_experts(config),
            "sliding_window": config.sliding_window,
        }
