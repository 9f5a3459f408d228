"""GPT-2: learned positions, and projections that are stored transposed."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.causal import Causal
from lightning_megatron.hf.weight_mapping import FusedQueryKeyValue, Same, WeightMapping, table

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


class GPT2(Causal):
    """Learned positions, LayerNorm, biases; linear layers are stored as ``[in, out]``."""

    model_type = "gpt2"
    prefix = "transformer."
    buffers = (r".*\.attn\.(bias|masked_bias)",)
    heads = {**Causal.heads, "causal_lm": "LMHeadModel"}
    token_head = "classifier"

    @override
    def read_config(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("scale_attn_weights", True)
        fields.must_be("scale_attn_by_inverse_layer_idx", False)
        fields.must_be("add_cross_attention", False)
        fields("reorder_and_upcast_attn")  # the same scores, less rounded
        return {
            "num_layers": fields("n_layer"),
            "hidden_size": fields("n_embd"),
            "num_attention_heads": fields("n_head"),
            "ffn_hidden_size": fields("n_inner"),
            "vocab_size": fields("vocab_size"),
            "seq_length": fields("n_positions"),
            "activation": fields.one_of("activation_function", _ACTIVATIONS),
            "layernorm_epsilon": fields("layer_norm_epsilon"),
            "hidden_dropout": fields.same("resid_pdrop", "embd_pdrop"),
            "attention_dropout": fields("attn_pdrop"),
            "tie_embeddings": fields("tie_word_embeddings"),
        }

    @override
    def write_config(self, config: Any) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        self._require(config, position_embedding=("learned",), normalization=("LayerNorm",), bias=(True,))
        self._require(config, qkv_bias=(None, True), num_query_groups=(None, config.num_attention_heads))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        self._require(config, activation=tuple(activations), parallel_residual=(False,), sliding_window=(None,))
        self._require(config, extra=({},), embedding_multiplier=(1.0,))
        return {
            "n_layer": config.num_layers,
            "n_embd": config.hidden_size,
            "n_head": config.num_attention_heads,
            "n_inner": config.ffn_hidden_size,
            "vocab_size": config.vocab_size,
            "n_positions": config.seq_length,
            "activation_function": activations[config.activation],
            "layer_norm_epsilon": config.layernorm_epsilon,
            "resid_pdrop": config.hidden_dropout,
            "embd_pdrop": config.hidden_dropout,
            "attn_pdrop": config.attention_dropout,
            "tie_word_embeddings": config.tie_embeddings,
        }

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        ours, theirs = "decoder.layers.{}.", "transformer.h.{}."
        entries: dict[str, Any] = {
            "embedding.word_embeddings.weight": "transformer.wte.weight",
            "embedding.position_embeddings.weight": "transformer.wpe.weight",
        }
        for kind in ("weight", "bias"):
            entries |= {
                f"{ours}input_layernorm.{kind}": f"{theirs}ln_1.{kind}",
                f"{ours}self_attention.linear_qkv.{kind}": FusedQueryKeyValue(f"{theirs}attn.c_attn.{kind}", True),
                f"{ours}self_attention.linear_proj.{kind}": Same(f"{theirs}attn.c_proj.{kind}", True),
                f"{ours}pre_mlp_layernorm.{kind}": f"{theirs}ln_2.{kind}",
                f"{ours}mlp.linear_fc1.{kind}": Same(f"{theirs}mlp.c_fc.{kind}", True),
                f"{ours}mlp.linear_fc2.{kind}": Same(f"{theirs}mlp.c_proj.{kind}", True),
                f"decoder.final_layernorm.{kind}": f"transformer.ln_f.{kind}",
            }
        return table(entries | self.output_layers(config), config.num_layers)
