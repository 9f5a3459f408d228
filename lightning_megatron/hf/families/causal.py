"""What causal language models share: transformers' classes with other heads on the same layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError
from lightning_megatron.hf.family import Family
from lightning_megatron.hf.meta_model import class_named

_USUAL_DROPOUT = 0.1  # transformers' before the head of token classification, where no field says it


class Causal(Family):
    """A base class of families; a task for which the installed transformers has no class is refused.

    Attributes:
        token_head: transformers' name of the layer of token classification.
    """

    heads: ClassVar[Mapping[str, str]] = {
        "causal_lm": "ForCausalLM",
        "sequence_classification": "ForSequenceClassification",
        "token_classification": "ForTokenClassification",
        "question_answering": "ForQuestionAnswering",
    }
    token_head: ClassVar[str] = "score"
    other_prefixes = ("transformer.",)  # of some classes that answer questions

    @override
    def read_head(self, fields: Fields, task: str | None) -> dict[str, Any]:
        named = {self._class_of(each): each for each in self.heads}
        found = next((named[name] for name in fields.config.architectures or () if name in named), "causal_lm")
        std = getattr(fields.config, "initializer_range", None) or 0.02  # transformers draws a new head by it
        return {"init_method_std": std, "task": found, **self._read_labels(fields, found, task or found)}

    def _read_labels(self, fields: Fields, found: str, task: str) -> dict[str, Any]:
        if task not in self.heads or task == "causal_lm":
            return {}
        self._check_class(task)
        if task == "question_answering":
            return {"num_labels": 2}
        dropouts = [getattr(fields.config, name, None) for name in ("classifier_dropout", "hidden_dropout")]
        fields.must_be("token_classification_bias", True)
        return {
            "num_labels": fields("num_labels"),
            "problem_type": fields("problem_type") if found == task == "sequence_classification" else None,
            "pad_token_id": fields("pad_token_id"),
            "classifier_dropout": next((each for each in dropouts if each is not None), _USUAL_DROPOUT),
        }

    @override
    def write_head(self, config: Any) -> dict[str, Any]:
        if config.task == "causal_lm":
            return {}
        self._check_class(config.task)
        if config.task == "question_answering":
            return {}
        padding = {} if config.pad_token_id is None else {"pad_token_id": config.pad_token_id}
        dropout = {"classifier_dropout": config.classifier_dropout} if config.task == "token_classification" else {}
        return {"num_labels": config.num_labels, "problem_type": config.problem_type, **padding, **dropout}

    def output_layers(self, config: Any) -> dict[str, Any]:
        """The tensors of the output layer over the vocabulary, or of the head in its place."""
        if config.task == "causal_lm":
            return {} if config.tie_embeddings else {"output_layer.weight": "lm_head.weight"}
        if config.task == "question_answering":
            return {f"qa_outputs.{kind}": f"qa_outputs.{kind}" for kind in ("weight", "bias")}
        theirs = self.token_head if config.task == "token_classification" else "score"
        kinds = ("weight", "bias") if config.head_has_bias else ("weight",)
        return {f"classification_head.{kind}": f"{theirs}.{kind}" for kind in kinds}

    @override
    def prefix_of(self, config: Any) -> str:
        theirs = class_named(self.architecture(config)) if config.task == "question_answering" else None
        return self.prefix if theirs is None else f"{theirs.base_model_prefix}."

    @override
    def tied(self, config: Any) -> dict[str, str]:
        return super().tied(config) if config.task == "causal_lm" else {}

    @override
    def architecture(self, config: Any) -> str:
        return self._class_of(config.task)

    @override
    def architectures(self, config: Any) -> tuple[str, ...]:
        return tuple(name for name in map(self._class_of, self.heads) if class_named(name) is not None)

    def _class_of(self, task: str) -> str:
        """The name of transformers' class of the task."""
        return f"{type(self).__name__}{self.heads[task]}"

    def _check_class(self, task: str) -> None:
        """Refuse a task for which transformers has no class of the family.

        Raises:
            UnsupportedConfigError: Names the class.
        """
        if class_named(self._class_of(task)) is None:
            raise UnsupportedConfigError(
                f"GPTConfig(task={task!r}): transformers has no {self._class_of(task)}, so that such a model could"
                " neither be loaded nor saved."
            )
