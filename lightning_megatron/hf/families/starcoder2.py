"""StarCoder 2: Llama's attention with LayerNorm, biases, and a feed-forward layer without a gate."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import rope, sizes
from lightning_megatron.hf.families.causal import Causal
from lightning_megatron.hf.weight_mapping import QueryKeyValue, WeightMapping, table

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


class Starcoder2(Causal):
    """A token may look back no further than a window, in every layer."""

    model_type = "starcoder2"
    prefix = "model."

    @override
    def read_config(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("head_dim", fields("hidden_size") // fields("num_attention_heads"), None)
        return {
            **sizes.read(fields),
            "activation": fields.one_of("hidden_act", _ACTIVATIONS),
            "layernorm_epsilon": fields("norm_epsilon"),
            "hidden_dropout": fields.same("residual_dropout", "embedding_dropout"),
            "bias": fields("use_bias"),
            "sliding_window": fields("sliding_window"),
            **rope.read(fields, partial=False),
        }

    @override
    def write_config(self, config: Any) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        self._require(config, position_embedding=("rope",), normalization=("LayerNorm",), rotary_percent=(1.0,))
        self._require(config, qkv_bias=(None, config.bias), activation=tuple(activations), extra=({},))
        self._require(config, parallel_residual=(False,), embedding_multiplier=(1.0,), sliding_window_layers=(None,))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        dropout = config.hidden_dropout
        return {
            **sizes.written(config),
            "hidden_act": activations[config.activation],
            "norm_epsilon": config.layernorm_epsilon,
            "residual_dropout": dropout,
            "embedding_dropout": dropout,
            "use_bias": config.bias,
            "sliding_window": config.sliding_window,
            "rope_parameters": rope.written(config),
        }

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        ours, theirs = "decoder.layers.{}.", "model.layers.{}."
        entries: dict[str, Any] = {"embedding.word_embeddings.weight": "model.embed_tokens.weight"}
        for kind in ("weight", "bias"):
            entries |= {
                f"{ours}input_layernorm.{kind}": f"{theirs}input_layernorm.{kind}",
                f"{ours}pre_mlp_layernorm.{kind}": f"{theirs}post_attention_layernorm.{kind}",
                f"decoder.final_layernorm.{kind}": f"model.norm.{kind}",
            }
        for kind in ("weight", "bias") if config.bias else ("weight",):
            heads = tuple(f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv")
            entries |= {
                f"{ours}self_attention.linear_qkv.{kind}": QueryKeyValue(heads),
                f"{ours}self_attention.linear_proj.{kind}": f"{theirs}self_attn.o_proj.{kind}",
                f"{ours}mlp.linear_fc1.{kind}": f"{theirs}mlp.c_fc.{kind}",
                f"{ours}mlp.linear_fc2.{kind}": f"{theirs}mlp.c_proj.{kind}",
            }
        return table(entries | self.output_layers(config), config.num_layers)
