"""The tasks of a BERT: the labels of a batch, the loss and the predictions of each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.collectives import (
    average_losses_across_data_parallel_group,
    gather_vocabulary,
    sum_over_parts_of_rows,
)
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models.batch_checks import check_range
from lightning_megatron.models.bert.config import BertTaskName
from lightning_megatron.models.bert.model import BertPretrainingLogits
from lightning_megatron.models.heads.question_answering import QuestionAnswering
from lightning_megatron.models.heads.tasks import (
    Parts,
    SequenceClassification,
    Task,
    TokenClassification,
    TokenLabels,
)
from lightning_megatron.models.layers.output_layer import cross_entropy_over_shards
from lightning_megatron.models.megatron_module import IGNORED_LABEL, Batch

_NO_PAIR = -1  # Megatron's: a row that the binary head does not learn from


class MaskedLM(TokenLabels):
    """Predict the tokens that were masked."""

    asks_number_of_labels = True

    def check(self, batch: Batch) -> None:
        """Refuse labels that are no token ids."""
        self._check_labels(batch, self.config.vocab_size, "vocab_size")

    def parts(self, output: Any, batch: Batch) -> Parts:
        """Cross-entropy of the tokens that have a label."""
        number: Any = batch.get("num_labels")
        return {"mlm_loss": cross_entropy_over_shards(output, batch["labels"], IGNORED_LABEL, number)}

    def predictions(self, output: Any, length: int, shards: SequenceShards) -> Any:
        """``[b, s, vocab]`` over the whole vocabulary."""
        return shards.gather(gather_vocabulary(output)[..., : self.config.vocab_size], 1)[:, :length]


class Pretraining(MaskedLM):
    """Masked tokens, and whether the second sentence is the wrong one."""

    def check(self, batch: Batch) -> None:
        """Refuse as for masked tokens, and unless each pair has a class."""
        super().check(batch)
        pairs = self._require(batch, "next_sentence_label", "[b], or Megatron's 'is_random'; 1: random or swapped")
        rows = batch["input_ids"].size(0)
        if pairs.numel() != rows:
            raise ValueError(
                f"BertModule: 'next_sentence_label' is {tuple(pairs.shape)}, and the batch has {rows} rows, which"
                " have one each. Correct the collate function."
            )
        counted = pairs[(pairs != IGNORED_LABEL) & (pairs != _NO_PAIR)]
        check_range("BertModule", "next_sentence_label", counted, 2, "the binary head's classes")

    check_shared_rows = Task.check_shared_rows

    def weigh(self, batch: Batch) -> Batch:
        """Add what one pair weighs in tokens, so that the loss of the global batch is the sum of the two means."""
        counts = [(self._tokens(batch) != IGNORED_LABEL).sum(), (self._pairs(batch) >= 0).sum()]
        tokens, pairs = average_losses_across_data_parallel_group(counts)
        rows = batch["input_ids"].size(0)
        return {**batch, "pair_weight": (tokens / pairs.clamp(min=1e-6)).repeat(rows)}

    def labels(self, batch: Batch) -> Batch:
        """The labels of both heads."""
        found = super().labels(batch)
        return {**found, **{key: batch[key] for key in ("next_sentence_label", "pair_weight") if key in batch}}

    def parts(self, output: BertPretrainingLogits, batch: Batch) -> Parts:
        """Cross-entropy of both heads."""
        pairs = self._pairs(batch)
        logits = output.seq_relationship_logits.float()
        sentence_order = F.cross_entropy(logits, pairs, ignore_index=_NO_PAIR, reduction="sum")
        sop_loss = _where_the_first_token_is(sentence_order, (pairs >= 0).sum())
        return {**super().parts(output.prediction_logits, batch), "sop_loss": sop_loss}

    def join(self, parts: Parts, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens count one each; pairs as much as ``weigh`` found, or in a mean of micro-batches as all its tokens."""
        (mlm, tokens), (sop, pairs) = parts["mlm_loss"], parts["sop_loss"]
        each = (
            batch["pair_weight"][0] if "pair_weight" in batch else sum_over_parts_of_rows(tokens) / pairs.clamp(min=1)
        )
        return mlm + sop * each, tokens

    def predictions(self, output: BertPretrainingLogits, length: int, shards: SequenceShards) -> Any:
        """Logits of both heads, ``BertPretrainingLogits``."""
        tokens = super().predictions(output.prediction_logits, length, shards)
        return BertPretrainingLogits(tokens, shards.from_first(output.seq_relationship_logits))

    def _tokens(self, batch: Batch) -> torch.Tensor:
        return batch["labels"]

    def _pairs(self, batch: Batch) -> torch.Tensor:
        pairs = batch["next_sentence_label"].view(-1).long()
        return pairs.masked_fill(pairs == IGNORED_LABEL, _NO_PAIR)


class ClassOfFirstToken(SequenceClassification):
    """A class, several classes or numbers for each sequence, from its first token."""

    def part_of_rank(self, total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, where the first tokens are."""
        return _where_the_first_token_is(total, count)

    def predictions(self, output: torch.Tensor, length: int, shards: SequenceShards) -> Any:
        """``[b, num_labels]``."""
        return shards.from_first(output)


def _where_the_first_token_is(total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss of the rows' first tokens, which the first context-parallel rank has; nothing on the others."""
    has_it = process_groups.context_parallel().rank() == 0
    return (total, count) if has_it else (total * 0.0, count * 0)


TASKS: dict[BertTaskName, type[Task]] = {
    "masked_lm": MaskedLM,
    "pretraining": Pretraining,
    "sequence_classification": ClassOfFirstToken,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
}
