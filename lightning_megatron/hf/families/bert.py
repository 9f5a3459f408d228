"""BERT, with each head that ``BertModule`` has."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.family import Family
from lightning_megatron.hf.weight_mapping import QueryKeyValue, WeightMapping, table

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
_ARCHITECTURES = {
    "masked_lm": "BertForMaskedLM",
    "pretraining": "BertForPreTraining",
    "sequence_classification": "BertForSequenceClassification",
    "token_classification": "BertForTokenClassification",
}
_POOLED = ("pretraining", "sequence_classification")


class Bert(Family):
    """Learned positions, token types, and norms after the blocks."""

    model_type = "bert"
    kind = "Bert"
    prefix = "bert."
    buffers = (r".*position_ids",)
    head = ("cls.", "classifier.", "bert.pooler.")

    @override
    def read_config(self, fields: Fields) -> dict[str, Any]:
        tasks = {theirs: ours for ours, theirs in _ARCHITECTURES.items()}
        named = [tasks[name] for name in fields.config.architectures or () if name in tasks]
        task = named[0] if named else "masked_lm"
        classifies = task.endswith("classification")
        fields.must_be("is_decoder", False)
        fields.must_be("add_cross_attention", False)
        fields.must_be("tie_word_embeddings", True)
        fields.must_be("position_embedding_type", "absolute")
        if classifies:
            fields.must_be("classifier_dropout", None, fields("hidden_dropout_prob"))
        return {
            "num_layers": fields("num_hidden_layers"),
            "hidden_size": fields("hidden_size"),
            "num_attention_heads": fields("num_attention_heads"),
            "ffn_hidden_size": fields("intermediate_size"),
            "vocab_size": fields("vocab_size"),
            "seq_length": fields("max_position_embeddings"),
            "num_token_types": fields("type_vocab_size"),
            "activation": fields.one_of("hidden_act", _ACTIVATIONS),
            "layernorm_epsilon": fields("layer_norm_eps"),
            "hidden_dropout": fields("hidden_dropout_prob"),
            "attention_dropout": fields("attention_probs_dropout_prob"),
            "task": task,
            "num_labels": fields("num_labels"),
            "problem_type": fields("problem_type") if task == "sequence_classification" else None,
        }

    @override
    def write_config(self, config: Any) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        self._require(config, norm_placement=("post",), activation=tuple(activations), extra=({},))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        return {
            "num_hidden_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.ffn_hidden_size or 4 * config.hidden_size,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.seq_length,
            "type_vocab_size": config.num_token_types,
            "hidden_act": activations[config.activation],
            "layer_norm_eps": config.layernorm_epsilon,
            "hidden_dropout_prob": config.hidden_dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "num_labels": config.num_labels,
            "problem_type": config.problem_type,
        }

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        ours, theirs, head = "encoder.layers.{}.", "bert.encoder.layer.{}.", "cls.predictions."
        entries: dict[str, Any] = {
            f"embedding.{kind}_embeddings.weight": f"bert.embeddings.{name}_embeddings.weight"
            for kind, name in (("word", "word"), ("position", "position"), ("tokentype", "token_type"))
        }
        for kind in ("weight", "bias"):
            attention = tuple(f"{theirs}attention.self.{name}.{kind}" for name in ("query", "key", "value"))
            entries |= {
                f"embedding.layer_norm.{kind}": f"bert.embeddings.LayerNorm.{kind}",
                f"{ours}self_attention.linear_qkv.{kind}": QueryKeyValue(attention),
                f"{ours}self_attention.linear_proj.{kind}": f"{theirs}attention.output.dense.{kind}",
                f"{ours}self_attn_bda.layer_norm.{kind}": f"{theirs}attention.output.LayerNorm.{kind}",
                f"{ours}mlp.linear_fc1.{kind}": f"{theirs}intermediate.dense.{kind}",
                f"{ours}mlp.linear_fc2.{kind}": f"{theirs}output.dense.{kind}",
                f"{ours}mlp_bda.layer_norm.{kind}": f"{theirs}output.LayerNorm.{kind}",
            }
            if config.task in ("masked_lm", "pretraining"):
                entries[f"lm_head.dense.{kind}"] = f"{head}transform.dense.{kind}"
                entries[f"lm_head.layer_norm.{kind}"] = f"{head}transform.LayerNorm.{kind}"
            if config.task in _POOLED:
                entries[f"pooler.dense.{kind}"] = f"bert.pooler.dense.{kind}"
            if config.task == "pretraining":
                entries[f"binary_head.{kind}"] = f"cls.seq_relationship.{kind}"
            if config.task.endswith("classification"):
                entries[f"classification_head.{kind}"] = f"classifier.{kind}"
        if config.task in ("masked_lm", "pretraining"):
            entries["output_layer.bias"] = f"{head}bias"
        return table(entries, config.num_layers)

    @override
    def tied(self, config: Any) -> dict[str, str]:
        head = "cls.predictions."
        return {f"{head}decoder.weight": "bert.embeddings.word_embeddings.weight", f"{head}decoder.bias": f"{head}bias"}

    @override
    def architecture(self, config: Any) -> str:
        return _ARCHITECTURES[config.task]

    @override
    def architectures(self, config: Any) -> tuple[str, ...]:
        return tuple(_ARCHITECTURES.values())
