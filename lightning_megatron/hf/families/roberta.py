"""RoBERTa: BERT's shape, with positions that begin beyond the id of padding and leave padding out."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError
from lightning_megatron.hf.families.bert import Bert


class Roberta(Bert):
    """There is no second sentence to predict, and a classifier has dropout before its first layer."""

    model_type = "roberta"
    prefix = "roberta."
    head = ("lm_head.", "classifier.", "qa_outputs.", "roberta.pooler.")
    heads = {task: ending for task, ending in Bert.heads.items() if task != "pretraining"}
    refused_heads = {
        "ForMultipleChoice": "It compares the scores of rows, and a batch's rows are cut into micro-batches here.",
    }
    expresses = ("position_padding_id", "pooler_dropout")

    @override
    def read_more(self, fields: Fields, task: str) -> dict[str, Any]:
        padding = fields("pad_token_id")
        if padding is None:
            raise UnsupportedConfigError(
                f"{self.model_type}: the configuration has pad_token_id=None, from which positions count."
            )
        if task == "masked_lm":
            fields.must_be("hidden_act", "gelu")  # that of the head, whatever the layers have
        return {
            "seq_length": fields("max_position_embeddings") - padding - 1,
            "position_padding_id": padding,
            "pooler_dropout": True,
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, pooler_dropout=(True,), task=tuple(self.heads))
        if config.position_padding_id is None:
            raise UnsupportedConfigError(
                f"BertConfig(position_padding_id=None) cannot be saved as a {self.model_type}, whose positions leave"
                " padding out."
            )
        if config.task == "masked_lm":
            self._require(config, activation=("gelu",))
        return {"max_position_embeddings": config.positions, "pad_token_id": config.position_padding_id}

    @override
    def head_layers(self, config: Any, kind: str) -> dict[str, Any]:
        if config.task == "masked_lm":
            layers = {f"lm_head.{name}.{kind}": f"lm_head.{name}.{kind}" for name in ("dense", "layer_norm")}
            return {**layers, "output_layer.bias": "lm_head.bias"}
        if config.task == "question_answering":
            return {f"qa_outputs.{kind}": f"qa_outputs.{kind}"}
        if config.task == "token_classification":
            return {f"classification_head.{kind}": f"classifier.{kind}"}
        return {
            f"pooler.dense.{kind}": f"classifier.dense.{kind}",
            f"classification_head.{kind}": f"classifier.out_proj.{kind}",
        }

    @override
    def tied(self, config: Any) -> dict[str, str]:
        word = f"{self.prefix}embeddings.word_embeddings.weight"
        return {"lm_head.decoder.weight": word, "lm_head.decoder.bias": "lm_head.bias"}
