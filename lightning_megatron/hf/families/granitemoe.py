"""Granite-MoE: Granite's shape and multipliers, with experts in all layers."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.granite import Granite
from lightning_megatron.hf.families.mixture import Mixture


class GraniteMoe(Mixture, Granite):
    """Files hold the experts of a layer in one tensor."""

    model_type = "granitemoe"
    expresses = (*Granite.expresses, *Mixture.expresses)
    block = "block_sparse_moe"
    router = "router"
    normalized = True

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        return {
            "bias": fields.must_be("attention_bias", False),
            **self.read_multipliers(fields),
            "experts": self.read_experts(fields, "num_local_experts"),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, bias=(False,), qkv_bias=(None, False), sliding_window=(None,), hidden_dropout=(0.0,))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        return {
            **self.write_multipliers(config),
            **self.write_experts(config, "num_local_experts"),
            "intermediate_size": self.width_of_experts(config),
            "attention_bias": False,
        }
