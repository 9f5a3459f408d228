"""GPTs with a head for labels in place of the output layer; a class for each kind of head."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from lightning_megatron.models.gpt.config import GPTConfig, GPTTaskName
from lightning_megatron.models.gpt.model import PositionedGPT
from lightning_megatron.models.heads.layers import label_layer, states_at, whole_sequence
from lightning_megatron.models.heads.question_answering import AnswerLogits


class HeadedGPT(PositionedGPT):
    """One chunk of a GPT, with a subclass's head on the last stage."""

    sharded_state_dict = MegatronModule.sharded_state_dict  # a language model's own wants an output layer
    _last_tokens: torch.Tensor | None = None

    def build_head(self, shape: GPTConfig) -> None:
        """Make the layers that ``head`` uses, in the place of megatron-core's output layer."""
        del self.output_layer
        self.classification_head = label_layer(self.config, shape.num_labels, shape.head_has_bias)

    def head(self, hidden: torch.Tensor) -> Any:
        """Logits, rows first, of the decoder's hidden states ``[s/tp, b, h]``."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Any,
        position_ids: torch.Tensor | None,
        attention_mask: Any,
        token_weights: torch.Tensor | None = None,
        later_tokens: Any = None,
        last_tokens: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Run the chunk.

        Args:
            input_ids: ``[b, s]``.
            position_ids: ``[b, s]``, or None; see ``PositionedGPT``.
            attention_mask: See ``PositionedGPT``.
            token_weights: ``[b, s]``, what experts are told.
            later_tokens: None; a head with labels predicts no tokens.
            last_tokens: ``[b]``, the place of each row's last token in the whole row.
            **_: Inputs that only the loss reads.

        Returns:
            Hidden states ``[s/tp, b, h]``, or on the last stage the head's logits.
        """
        self._last_tokens = last_tokens
        return super().forward(input_ids, position_ids, attention_mask, token_weights)

    def _postprocess(self, hidden_states: torch.Tensor, labels: Any = None, **rest: Any) -> Any:
        return self.head(hidden_states) if self.post_process else hidden_states


class GPTForSequenceClassification(HeadedGPT):
    """Logits ``[b, num_labels]`` from the last token of each row, the same on all ranks that share the row."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[b, num_labels]``."""
        assert self._last_tokens is not None
        return self.classification_head(states_at(self.config, hidden, self._last_tokens))


class GPTForTokenClassification(HeadedGPT):
    """Logits ``[b, s, num_labels]`` of each token."""

    def build_head(self, shape: GPTConfig) -> None:
        """Make the classifier, with dropout before it."""
        super().build_head(shape)
        self.classification_dropout = torch.nn.Dropout(shape.classifier_dropout)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[b, s, num_labels]``, the same on every tensor-parallel rank."""
        whole = whole_sequence(self.config, hidden)
        return self.classification_head(self.classification_dropout(whole)).transpose(0, 1)


class GPTForQuestionAnswering(HeadedGPT):
    """Logits ``[b, s]`` of each token as an answer's first one, and as its last one."""

    def build_head(self, shape: GPTConfig) -> None:
        """Make the linear layer."""
        del self.output_layer
        self.qa_outputs = label_layer(self.config, shape.num_labels)

    def head(self, hidden: torch.Tensor) -> AnswerLogits:
        """Logits, the same on every tensor-parallel rank."""
        return AnswerLogits.of(self.qa_outputs(whole_sequence(self.config, hidden)))


MODELS: dict[GPTTaskName, type[PositionedGPT]] = {
    "causal_lm": PositionedGPT,
    "sequence_classification": GPTForSequenceClassification,
    "token_classification": GPTForTokenClassification,
    "question_answering": GPTForQuestionAnswering,
}
