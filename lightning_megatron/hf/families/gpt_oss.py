"""GPT-OSS: experts with biases and a clamped activation, sinks in attention, and a window in every other layer."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError
from lightning_megatron.hf.families import layer_types
from lightning_megatron.hf.families.mixture import Mixture
from lightning_megatron.hf.weight_mapping import ExpertColumns, WeightMapping, table

_ALPHA = 1.702  # of megatron-core's quick_gelu, which has no other


class GptOss(Mixture):
    """Weights in MXFP4, as they are published, are refused; load a version of the model in bf16."""

    model_type = "gpt_oss"
    expresses = (*Mixture.expresses, "attention_sinks")
    activations: ClassVar[dict[str, str]] = {"silu": "quick_geglu"}
    router = "router"
    normalized = True

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("swiglu_alpha", _ALPHA)
        fields.must_be("attention_dropout", 0.0)
        limit = fields("swiglu_limit") if hasattr(fields.config, "swiglu_limit") else 7.0
        return {
            "bias": fields.must_be("attention_bias", True),
            "attention_sinks": True,
            "extra": {"glu_linear_offset": 1.0, "activation_func_clamp_value": limit},
            **layer_types.read(fields),
            "experts": self.read_experts(fields, "num_local_experts"),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        limit = config.extra.get("activation_func_clamp_value")
        self._require(config, extra=({"glu_linear_offset": 1.0, "activation_func_clamp_value": limit},))
        if limit is None:
            raise UnsupportedConfigError(
                "GPTConfig(extra={'activation_func_clamp_value': None}) cannot be saved as a gpt_oss, whose"
                " activation has a limit."
            )
        self._require(config, bias=(True,), qkv_bias=(None, True), attention_sinks=(True,), attention_dropout=(0.0,))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        return {
            **self.write_experts(config, "num_local_experts"),
            **layer_types.written(config, switch=False),
            "intermediate_size": self.width_of_experts(config),
            "attention_bias": True,
            "swiglu_alpha": _ALPHA,
            "swiglu_limit": limit,
        }

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        ours, theirs = (
            "decoder.layers.{}.self_attention.core_attention.softmax_offset",
            "model.layers.{}.self_attn.sinks",
        )
        return {**super().weight_mapping(config), **table({ours: theirs}, config.num_layers)}

    @override
    def expert_layer(self, ours: str, theirs: str, config: Any) -> dict[str, Any]:
        experts = f"{theirs}experts."
        return {
            f"{ours}router.weight": f"{theirs}router.weight",
            f"{ours}router.bias": f"{theirs}router.bias",
            f"{ours}experts.linear_fc1.weight": ExpertColumns(f"{experts}gate_up_proj", in_turns=True),
            f"{ours}experts.linear_fc1.bias": ExpertColumns(f"{experts}gate_up_proj_bias", in_turns=True),
            f"{ours}experts.linear_fc2.weight": ExpertColumns(f"{experts}down_proj"),
            f"{ours}experts.linear_fc2.bias": f"{experts}down_proj_bias",
        }
