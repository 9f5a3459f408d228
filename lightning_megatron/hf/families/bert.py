"""BERT, with each head that ``BertModule`` has."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError
from lightning_megatron.hf.families import sizes
from lightning_megatron.hf.family import Family
from lightning_megatron.hf.weight_mapping import QueryKeyValue, WeightMapping, table

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
_HEADS = {
    "masked_lm": "ForMaskedLM",
    "pretraining": "ForPreTraining",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
_POOLED = ("pretraining", "sequence_classification")


class Bert(Family):
    """Learned positions, token types, and norms after the blocks."""

    model_type = "bert"
    kind = "Bert"
    prefix = "bert."
    buffers = (r".*position_ids",)
    head: ClassVar[tuple[str, ...]] = ("cls.", "classifier.", "qa_outputs.", "bert.pooler.")
    heads = _HEADS  # by our task, how the names of their classes end
    refused_heads = {
        "ForNextSentencePrediction": (
            "Its head is the second one of task='pretraining', which loads it, and begins the first anew."
        ),
        "ForMultipleChoice": (
            "It compares the scores of rows, and a batch's rows are cut into micro-batches here."
            " config={'task': 'sequence_classification', 'num_labels': 1} loads its head, too, as a score of each row."
        ),
    }

    @override
    def read_config(self, fields: Fields) -> dict[str, Any]:
        task = self.task(fields)
        classifies = task.endswith("classification")
        fields.must_be("is_decoder", False)
        fields.must_be("add_cross_attention", False)
        fields.must_be("tie_word_embeddings", True)
        fields.must_be("position_embedding_type", "absolute")
        if task == "question_answering":
            fields.must_be("num_labels", 2)
        if classifies:
            fields.must_be("classifier_dropout", None, fields("hidden_dropout_prob"))
        return {
            **sizes.read_shape(fields),
            "num_token_types": fields("type_vocab_size"),
            "activation": fields.one_of("hidden_act", _ACTIVATIONS),
            "layernorm_epsilon": fields("layer_norm_eps"),
            "hidden_dropout": fields("hidden_dropout_prob"),
            "attention_dropout": fields("attention_probs_dropout_prob"),
            "task": task,
            "num_labels": fields("num_labels"),
            "problem_type": fields("problem_type") if task == "sequence_classification" else None,
            **self.read_more(fields, task),
        }

    def task(self, fields: Fields) -> str:
        """Our name of the task of the configuration's architecture; masked language modelling where that has none."""
        tasks = {f"{type(self).__name__}{theirs}": ours for ours, theirs in self.heads.items()}
        named = [tasks[name] for name in fields.config.architectures or () if name in tasks]
        return named[0] if named else "masked_lm"

    def read_more(self, fields: Fields, task: str) -> dict[str, Any]:
        """What differs between the families of this shape."""
        return {}

    @override
    def read_head(self, fields: Fields, task: str | None) -> dict[str, Any]:
        if task in _HEADS and task not in self.heads:
            raise UnsupportedConfigError(
                f"config={{'task': {task!r}}}: {self.model_type} has no such head in transformers. Choose from:"
                f" {', '.join(self.heads)}."
            )
        return super().read_head(fields, task)

    @override
    def write_config(self, config: Any) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        self._require(config, norm_placement=("post",), activation=tuple(activations), extra=({},))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        if config.num_token_types == 0:
            raise UnsupportedConfigError(
                f"BertConfig(num_token_types=0) cannot be saved as a {self.model_type}, whose tokens have types."
            )
        return {
            **sizes.written_shape(config),
            "type_vocab_size": config.num_token_types,
            "hidden_act": activations[config.activation],
            "layer_norm_eps": config.layernorm_epsilon,
            "hidden_dropout_prob": config.hidden_dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "num_labels": config.num_labels,
            "problem_type": config.problem_type,
            **self.write_more(config),
        }

    def write_more(self, config: Any) -> dict[str, Any]:
        """What differs between the families of this shape."""
        return {}

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        ours, theirs = "encoder.layers.{}.", f"{self.prefix}encoder.layer.{{}}."
        entries: dict[str, Any] = {
            f"embedding.{kind}_embeddings.weight": f"{self.prefix}embeddings.{name}_embeddings.weight"
            for kind, name in (("word", "word"), ("position", "position"), ("tokentype", "token_type"))
        }
        for kind in ("weight", "bias"):
            attention = tuple(f"{theirs}attention.self.{name}.{kind}" for name in ("query", "key", "value"))
            entries |= {
                f"embedding.layer_norm.{kind}": f"{self.prefix}embeddings.LayerNorm.{kind}",
                f"{ours}self_attention.linear_qkv.{kind}": QueryKeyValue(attention),
                f"{ours}self_attention.linear_proj.{kind}": f"{theirs}attention.output.dense.{kind}",
                f"{ours}self_attn_bda.layer_norm.{kind}": f"{theirs}attention.output.LayerNorm.{kind}",
                f"{ours}mlp.linear_fc1.{kind}": f"{theirs}intermediate.dense.{kind}",
                f"{ours}mlp.linear_fc2.{kind}": f"{theirs}output.dense.{kind}",
                f"{ours}mlp_bda.layer_norm.{kind}": f"{theirs}output.LayerNorm.{kind}",
            }
            entries |= self.head_layers(config, kind)
        return table(entries, config.num_layers)

    def head_layers(self, config: Any, kind: str) -> dict[str, Any]:
        """The weights or biases of the head."""
        entries = {}
        if config.task in ("masked_lm", "pretraining"):
            entries[f"lm_head.dense.{kind}"] = f"cls.predictions.transform.dense.{kind}"
            entries[f"lm_head.layer_norm.{kind}"] = f"cls.predictions.transform.LayerNorm.{kind}"
            entries["output_layer.bias"] = "cls.predictions.bias"
        if config.task in _POOLED:
            entries[f"pooler.dense.{kind}"] = f"bert.pooler.dense.{kind}"
        if config.task == "pretraining":
            entries[f"binary_head.{kind}"] = f"cls.seq_relationship.{kind}"
        if config.task == "question_answering":
            entries[f"qa_outputs.{kind}"] = f"qa_outputs.{kind}"
        if config.task.endswith("classification"):
            entries[f"classification_head.{kind}"] = f"classifier.{kind}"
        return entries

    @override
    def tied(self, config: Any) -> dict[str, str]:
        head = "cls.predictions."
        return {f"{head}decoder.weight": "bert.embeddings.word_embeddings.weight", f"{head}decoder.bias": f"{head}bias"}

    @override
    def architecture(self, config: Any) -> str:
        return f"{type(self).__name__}{self.heads[config.task]}"

    @override
    def architectures(self, config: Any) -> tuple[str, ...]:
        return tuple(f"{type(self).__name__}{ending}" for ending in self.heads.values())
