"""T5, of version 1.0 and of version 1.1."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.family import Family
from lightning_megatron.hf.weight_mapping import KeyValue, QueryKeyValue, Stacked, WeightMapping, table

_ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu", "gelu": "gelu"}
_SEQ_LENGTH = 512  # the published models' training length; the positions are relative and know none


class T5(Family):
    """An encoder and a decoder with a position bias for each stack."""

    model_type = "t5"
    kind = "T5"
    body = ("shared.", "encoder.", "decoder.")

    @override
    def read_config(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("is_decoder", False)
        usual = type(fields.config)(feed_forward_proj=fields("feed_forward_proj"))
        for name in ("dense_act_fn", "is_gated_act"):  # transformers' own notes of it, which a file may contradict
            fields.must_be(name, getattr(usual, name))
        fields("tie_word_embeddings")
        length = fields("n_positions") if hasattr(fields.config, "n_positions") else _SEQ_LENGTH
        start = getattr(fields.config, "decoder_start_token_id", None)
        return {
            "num_layers": fields("num_layers"),
            "decoder_num_layers": fields("num_decoder_layers"),
            "hidden_size": fields("d_model"),
            "num_attention_heads": fields("num_heads"),
            "kv_channels": fields("d_kv"),
            "ffn_hidden_size": fields("d_ff"),
            "vocab_size": fields("vocab_size"),
            "seq_length": length,
            "activation": fields.one_of("feed_forward_proj", _ACTIVATIONS),
            "layernorm_epsilon": fields("layer_norm_epsilon"),
            "hidden_dropout": fields("dropout_rate"),
            "attention_dropout": fields("dropout_rate"),
            "relative_attention_num_buckets": fields("relative_attention_num_buckets"),
            "relative_attention_max_distance": fields("relative_attention_max_distance"),
            "tie_embeddings": fields("scale_decoder_outputs"),  # only tied outputs are scaled
            "decoder_start_id": start if start is not None else fields.config.pad_token_id or 0,
        }

    @override
    def write_config(self, config: Any) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
        self._require(config, position_embedding=("relative",), normalization=("RMSNorm",), extra=({},))
        self._require(config, activation=tuple(activations), attention_dropout=(config.hidden_dropout,))
        return {
            "num_layers": config.encoder_layers,
            "num_decoder_layers": config.decoder_layers,
            "d_model": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "d_kv": config.kv_channels or config.hidden_size // config.num_attention_heads,
            "d_ff": config.ffn_hidden_size or 4 * config.hidden_size,
            "vocab_size": config.vocab_size,
            "feed_forward_proj": activations[config.activation],
            "layer_norm_epsilon": config.layernorm_epsilon,
            "dropout_rate": config.hidden_dropout,
            "relative_attention_num_buckets": config.relative_attention_num_buckets,
            "relative_attention_max_distance": config.relative_attention_max_distance,
            "tie_word_embeddings": config.tie_embeddings,
            "decoder_start_token_id": config.decoder_start_id,
        }

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        entries = {"embedding.word_embeddings.weight": "shared.weight"}
        if not config.tie_embeddings:
            entries["output_layer.weight"] = "lm_head.weight"
        encoder, decoder = self._stack("encoder", config), self._stack("decoder", config)
        ours, theirs = "decoder.layers.{}.cross_attention.", "decoder.block.{}.layer.1."
        decoder |= {
            "decoder.layers.{}.pre_cross_attn_layernorm.weight": f"{theirs}layer_norm.weight",
            f"{ours}linear_q.weight": f"{theirs}EncDecAttention.q.weight",
            f"{ours}linear_kv.weight": KeyValue(tuple(f"{theirs}EncDecAttention.{name}.weight" for name in "kv")),
            f"{ours}linear_proj.weight": f"{theirs}EncDecAttention.o.weight",
        }
        return {**table(entries), **table(encoder, config.encoder_layers), **table(decoder, config.decoder_layers)}

    @override
    def tied(self, config: Any) -> dict[str, str]:
        copies = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight")
        return {**copies, "lm_head.weight": "shared.weight"} if config.tie_embeddings else copies

    @override
    def architecture(self, config: Any) -> str:
        return "T5ForConditionalGeneration"

    def _stack(self, stack: str, config: Any) -> dict[str, Any]:
        """What both stacks have; the feed-forward layer is the last of a block."""
        ours, attention = f"{stack}.layers.{{}}.", f"{stack}.block.{{}}.layer.0."
        feed = f"{stack}.block.{{}}.layer.{1 if stack == 'encoder' else 2}."
        inputs = ("wi_0", "wi_1") if config.is_gated else ("wi",)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return {
            f"{stack}_relative_pos_emb.relative_attention_bias.weight": bias,
            f"{ours}input_layernorm.weight": f"{attention}layer_norm.weight",
            f"{ours}self_attention.linear_qkv.weight": QueryKeyValue(
                tuple(f"{attention}SelfAttention.{name}.weight" for name in "qkv")
            ),
            f"{ours}self_attention.linear_proj.weight": f"{attention}SelfAttention.o.weight",
            f"{ours}pre_mlp_layernorm.weight": f"{feed}layer_norm.weight",
            f"{ours}mlp.linear_fc1.weight": Stacked(tuple(f"{feed}DenseReluDense.{name}.weight" for name in inputs)),
            f"{ours}mlp.linear_fc2.weight": f"{feed}DenseReluDense.wo.weight",
            f"{stack}.final_layernorm.weight": f"{stack}.final_layer_norm.weight",
        }
