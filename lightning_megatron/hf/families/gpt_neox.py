"""GPT-NeoX and Pythia: rotary positions, and layers whose feed-forward part is beside attention."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import rope, sizes
from lightning_megatron.hf.families.causal import Causal
from lightning_megatron.hf.weight_mapping import WeightMapping, table

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu"}


class GPTNeoX(Causal):
    """Rotary positions on part of a head, and a feed-forward layer beside attention; heads are stored as here."""

    model_type = "gpt_neox"
    prefix = "gpt_neox."
    buffers = (r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)
    token_head = "classifier"

    @override
    def read_config(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("is_decoder", False, True)
        fields.must_be("head_dim", fields("hidden_size") // fields("num_attention_heads"), None)
        return {
            **sizes.read_shape(fields),
            "activation": fields.one_of("hidden_act", _ACTIVATIONS),
            "layernorm_epsilon": fields("layer_norm_eps"),
            "hidden_dropout": fields("hidden_dropout"),
            "attention_dropout": fields("attention_dropout"),
            "bias": fields.must_be("attention_bias", True),
            "parallel_residual": fields("use_parallel_residual"),
            "tie_embeddings": fields("tie_word_embeddings"),
            **rope.read(fields, partial=True),
        }

    @override
    def write_config(self, config: Any) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        self._require(config, position_embedding=("rope",), normalization=("LayerNorm",), bias=(True,))
        self._require(config, qkv_bias=(None, True), num_query_groups=(None, config.num_attention_heads))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        self._require(config, activation=tuple(activations), sliding_window=(None,), extra=({},))
        self._require(config, embedding_multiplier=(1.0,))
        return {
            **sizes.written_shape(config),
            "hidden_act": activations[config.activation],
            "layer_norm_eps": config.layernorm_epsilon,
            "hidden_dropout": config.hidden_dropout,
            "attention_dropout": config.attention_dropout,
            "use_parallel_residual": config.parallel_residual,
            "tie_word_embeddings": config.tie_embeddings,
            "rope_parameters": rope.written(config),
        }

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        ours, theirs = "decoder.layers.{}.", "gpt_neox.layers.{}."
        entries: dict[str, Any] = {"embedding.word_embeddings.weight": "gpt_neox.embed_in.weight"}
        for kind in ("weight", "bias"):
            entries |= {
                f"{ours}input_layernorm.{kind}": f"{theirs}input_layernorm.{kind}",
                f"{ours}self_attention.linear_qkv.{kind}": f"{theirs}attention.query_key_value.{kind}",
                f"{ours}self_attention.linear_proj.{kind}": f"{theirs}attention.dense.{kind}",
                f"{ours}pre_mlp_layernorm.{kind}": f"{theirs}post_attention_layernorm.{kind}",
                f"{ours}mlp.linear_fc1.{kind}": f"{theirs}mlp.dense_h_to_4h.{kind}",
                f"{ours}mlp.linear_fc2.{kind}": f"{theirs}mlp.dense_4h_to_h.{kind}",
                f"decoder.final_layernorm.{kind}": f"gpt_neox.final_layer_norm.{kind}",
            }
        return table(entries | self.output_layers(config), config.num_layers)
