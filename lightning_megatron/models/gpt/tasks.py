"""The tasks of a GPT: the labels of a batch, the loss and the predictions of each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron.distributed.collectives import gather_vocabulary
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models.gpt import batches
from lightning_megatron.models.gpt.config import GPTTaskName
from lightning_megatron.models.heads.question_answering import START, QuestionAnswering
from lightning_megatron.models.heads.tasks import Parts, SequenceClassification, Task, TokenClassification, TokenLabels
from lightning_megatron.models.megatron_module import IGNORED_LABEL, Batch


class CausalLM(TokenLabels):
    """Predict the next token."""

    def check(self, batch: Batch) -> None:
        """Refuse labels that are no token ids."""
        batches.check_labels(self.config, batch)

    def labels(self, batch: Batch) -> Batch:
        """The tokens that follow, and the loss mask ``[b, s]``."""
        return batches.labelled(batch)

    def pad_labels(self, inputs: Batch, padding: int) -> Batch:
        """The labels; the loss mask is 0 at the tokens that are added."""
        return {"labels": F.pad(inputs["labels"], (0, padding))} if "labels" in inputs else {}

    def parts(self, output: torch.Tensor, batch: Batch) -> Parts:
        """Sum and count over the tokens that the loss mask keeps."""
        mask = batch["loss_mask"]
        total = output if output.dim() == 0 else (output.float() * mask).sum()
        return {"loss": (total, mask.sum())}

    def predictions(self, output: torch.Tensor, length: int, shards: SequenceShards) -> Any:
        """``[b, s, vocab]`` over the whole vocabulary."""
        return shards.gather(gather_vocabulary(output)[..., : self.config.vocab_size], 1)[:, :length]


class ClassOfLastToken(SequenceClassification):
    """A class, several classes or numbers for each sequence, from its last token that is no padding."""

    def labels(self, batch: Batch) -> Batch:
        """The labels, and the place of each row's last token ``[b]``."""
        last = last_tokens(batch, self.config.pad_token_id)
        found = {**super().labels(batch), "last_tokens": last}
        if self.config.experts is not None:
            found["loss_mask"] = self._share_of_tokens(batch, last)
        return found

    def complete(self, inputs: Batch) -> Batch:
        """The inputs, with the last tokens."""
        if "last_tokens" in inputs:
            return inputs
        return {**inputs, "last_tokens": last_tokens(inputs, self.config.pad_token_id)}

    def _share_of_tokens(self, batch: Batch, last: torch.Tensor) -> torch.Tensor:
        """``[b, s]``, what each token counts in the losses of experts: together, what its row counts in the loss."""
        count = torch.full_like(last, self.config.num_labels, dtype=torch.float32)
        labels = batch.get("labels")
        if labels is not None and self._problem(labels) == "single_label_classification":
            count = (labels.view(-1) != IGNORED_LABEL).float()
        places = torch.arange(batch["input_ids"].size(1), device=last.device)
        return (places <= last[:, None]) * (count / (last + 1))[:, None]


class ClassOfEachToken(TokenClassification):
    """A class for each token."""

    def labels(self, batch: Batch) -> Batch:
        """The labels, and with experts what each token counts in their losses: as in the loss."""
        found = super().labels(batch)
        if self.config.experts is not None and "labels" in found:
            found["loss_mask"] = (found["labels"] != IGNORED_LABEL).float()
        return found


class AnswerInText(QuestionAnswering):
    """The tokens at which the answer of each row begins and ends."""

    def labels(self, batch: Batch) -> Batch:
        """The positions, and with experts what each token counts in their losses: together, as much as its answer."""
        found = super().labels(batch)
        if self.config.experts is not None and found:
            tokens, mask = batch["input_ids"], batch.get("attention_mask")
            kept = torch.ones_like(tokens, dtype=torch.bool)
            if isinstance(mask, torch.Tensor) and mask.shape == tokens.shape:
                kept = mask > 0
            count = (found[START] != IGNORED_LABEL) / kept.sum(dim=1).clamp(min=1)
            found["loss_mask"] = kept * count[:, None]
        return found


def last_tokens(batch: Batch, padding: int | None) -> torch.Tensor:
    """``[b]``, the place of each row's last token that is no padding, wherever the padding is; 0 where all is padding.

    Args:
        batch: ``input_ids`` ``[b, s]``; an ``attention_mask`` of that shape says what is padding where no token does.
        padding: The token of padding. transformers goes by it alone, and by no mask.
    """
    tokens, mask = batch["input_ids"], batch.get("attention_mask")
    places = torch.arange(tokens.size(1), device=tokens.device)
    if padding is not None:
        kept = tokens != padding
    elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
        kept = mask > 0
    else:
        kept = torch.ones_like(tokens, dtype=torch.bool)
    return (places * kept).argmax(dim=1)


TASKS: dict[GPTTaskName, type[Task]] = {
    "causal_lm": CausalLM,
    "sequence_classification": ClassOfLastToken,
    "token_classification": ClassOfEachToken,
    "question_answering": AnswerInText,
}
