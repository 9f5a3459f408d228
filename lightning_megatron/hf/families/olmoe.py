"""OLMoE: Llama's shape, with norms on all queries and all keys of a token, and experts in all layers."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.mixture import Mixture

_NORMED = {"qk_layernorm": True}


class Olmoe(Mixture):
    """The weights of a token's experts need not add up to 1."""

    model_type = "olmoe"
    expresses = ("joint_qk_norm", *Mixture.expresses)

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("clip_qkv", None)
        return {
            "bias": fields.must_be("attention_bias", False),
            "joint_qk_norm": True,
            "extra": dict(_NORMED),
            "experts": self.read_experts(fields, "num_experts"),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, joint_qk_norm=(True,), extra=(_NORMED,), bias=(False,), qkv_bias=(None, False))
        self._require(config, sliding_window=(None,), hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        return {
            **self.write_experts(config, "num_experts"),
            "intermediate_size": self.width_of_experts(config),
            "attention_bias": False,
        }
