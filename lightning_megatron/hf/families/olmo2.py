"""OLMo 2: Llama's shape, with norms on the output of each block, and on all queries and all keys of a token."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.llama import Llama

_NORMED = {"qk_layernorm": True}


class Olmo2(Llama):
    """No norm stands before a block."""

    model_type = "olmo2"
    expresses = ("norm_placement", "joint_qk_norm")
    norms = (
        ("post_self_attn_layernorm", "post_attention_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    )

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        return {
            "bias": fields.must_be("attention_bias", False),
            "norm_placement": "output",
            "joint_qk_norm": True,
            "extra": dict(_NORMED),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, norm_placement=("output",), joint_qk_norm=(True,), extra=(_NORMED,))
        self._require(config, bias=(False,), qkv_bias=(None, False), sliding_window=(None,))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        return {"attention_bias": False}
