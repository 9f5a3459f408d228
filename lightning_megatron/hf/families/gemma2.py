"""Gemma 2: the first one's shape, with caps on scores and logits, norms on both sides of each block, and windows."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError
from lightning_megatron.hf.families import layer_types
from lightning_megatron.hf.families.llama import Llama

_NORMS = {"layernorm_zero_centered_gamma": True}


class Gemma2(Llama):
    """Every second layer has a window of attention."""

    model_type = "gemma2"
    activation_field = "hidden_activation"
    expresses = ("norm_placement", "attention_score_cap", "logits_cap")
    extra = _NORMS  # beside the factor on the scores
    norms = (
        ("input_layernorm", "input_layernorm"),
        ("post_self_attn_layernorm", "post_attention_layernorm"),
        ("pre_mlp_layernorm", "pre_feedforward_layernorm"),
        ("post_mlp_layernorm", "post_feedforward_layernorm"),
    )

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("use_bidirectional_attention", None, False)
        return {
            "bias": fields.must_be("attention_bias", False),
            "norm_placement": "sandwich",
            "embedding_multiplier": fields("hidden_size") ** 0.5,
            "attention_score_cap": fields("attn_logit_softcapping"),
            "logits_cap": fields("final_logit_softcapping"),
            "extra": {**self.extra, "softmax_scale": fields("query_pre_attn_scalar") ** -0.5},
            **layer_types.read(fields),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        size = config.kv_channels or config.hidden_size // config.num_attention_heads
        scale = config.extra.get("softmax_scale", size**-0.5)
        self._require(config, norm_placement=("sandwich",), bias=(False,), qkv_bias=(None, False))
        self._require(config, extra=({**self.extra, "softmax_scale": scale}, self.extra))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(config.hidden_size**0.5,))
        if round(scale**-2) ** -0.5 != scale:
            raise UnsupportedConfigError(
                f"{type(config).__name__}(extra={{'softmax_scale': {scale}}}) cannot be saved as a {self.model_type},"
                " whose factor on the scores is one over the root of a whole number."
            )
        return {
            "attention_bias": False,
            "attn_logit_softcapping": config.attention_score_cap,
            "final_logit_softcapping": config.logits_cap,
            "query_pre_attn_scalar": round(scale**-2),
            **layer_types.written(config, switch=False),
        }
