"""Phi 1, 1.5 and 2: rotary positions on part of a head, and a feed-forward layer beside attention behind one norm."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import rope, sizes
from lightning_megatron.hf.families.causal import Causal
from lightning_megatron.hf.weight_mapping import QueryKeyValue, WeightMapping, table

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


class Phi(Causal):
    """All linear layers have biases, the output layer too."""

    model_type = "phi"
    prefix = "model."
    buffers = (r".*rotary_emb\.inv_freq",)
    expresses = ("shared_norm", "output_bias")

    @override
    def read_config(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("head_dim", fields("hidden_size") // fields("num_attention_heads"), None)
        return {
            **sizes.read(fields),
            "activation": fields.one_of("hidden_act", _ACTIVATIONS),
            "layernorm_epsilon": fields("layer_norm_eps"),
            "hidden_dropout": fields.same("resid_pdrop", "embd_pdrop"),
            "parallel_residual": True,
            "shared_norm": True,
            "output_bias": True,
            "extra": {"qk_layernorm": True} if fields("qk_layernorm") else {},
            **rope.read(fields, partial=True),
        }

    @override
    def write_config(self, config: Any) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        self._require(config, shared_norm=(True,), output_bias=(True,), bias=(True,), qkv_bias=(None, True))
        self._require(config, position_embedding=("rope",), normalization=("LayerNorm",))
        self._require(config, activation=tuple(activations), extra=({}, {"qk_layernorm": True}))
        self._require(config, sliding_window=(None,), embedding_multiplier=(1.0,))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        dropout = config.hidden_dropout
        return {
            **sizes.written(config),
            "hidden_act": activations[config.activation],
            "layer_norm_eps": config.layernorm_epsilon,
            "resid_pdrop": dropout,
            "embd_pdrop": dropout,
            "qk_layernorm": bool(config.extra),
            "rope_parameters": {"partial_rotary_factor": 1.0, **rope.written(config)},  # their default is 0.5
        }

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        ours, theirs = "decoder.layers.{}.", "model.layers.{}."
        entries: dict[str, Any] = {"embedding.word_embeddings.weight": "model.embed_tokens.weight"}
        for kind in ("weight", "bias"):
            heads = tuple(f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv")
            entries |= {
                f"{ours}input_layernorm.{kind}": f"{theirs}input_layernorm.{kind}",
                f"{ours}self_attention.linear_qkv.{kind}": QueryKeyValue(heads),
                f"{ours}self_attention.linear_proj.{kind}": f"{theirs}self_attn.dense.{kind}",
                f"{ours}mlp.linear_fc1.{kind}": f"{theirs}mlp.fc1.{kind}",
                f"{ours}mlp.linear_fc2.{kind}": f"{theirs}mlp.fc2.{kind}",
                f"decoder.final_layernorm.{kind}": f"model.final_layernorm.{kind}",
            }
            if config.extra.get("qk_layernorm"):
                entries |= {
                    f"{ours}self_attention.{name}_layernorm.{kind}": f"{theirs}self_attn.{name}_layernorm.{kind}"
                    for name in "qk"
                }
        return table(entries | self.output_layers(config), config.num_layers)

    @override
    def output_layers(self, config: Any) -> dict[str, Any]:
        bias = {"output_layer.bias": "lm_head.bias"} if config.task == "causal_lm" else {}
        return super().output_layers(config) | bias
