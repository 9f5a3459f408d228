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
from lightning_megatron.models.batch_checks import check_range, check_tokens
from lightning_megatron.models.bert.config import BertConfig, BertTaskName
from lightning_megatron.models.bert.model import (
    BertForMaskedLM,
    BertForPretraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPretrainingLogits,
)
from lightning_megatron.models.layers.output_layer import cross_entropy_over_shards
from lightning_megatron.models.megatron_module import IGNORED_LABEL, Batch

_NO_PAIR = -1  # Megatron's: a row that the binary head does not learn from

# Sum and count, by the name under which the mean is logged; "loss" has its own logging.
Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]


class BertTask:
    """A task: its model, and what its labels mean.

    Args:
        config: Configuration of the model.
    """

    model: type[BertModel]
    asks_number_of_labels = False  # whether the loss uses ``num_labels``, which the host then counts in a batch

    def __init__(self, config: BertConfig) -> None:
        self.config = config

    def check(self, batch: Batch) -> None:
        """Refuse labels that the task cannot learn from; ``batch`` has transformers' keys.

        Raises:
            ValueError: A value is wrong; the message has it.
        """
        raise NotImplementedError

    def check_shared_rows(self) -> None:
        """Refuse rows that several texts share, where the head reads the first token of a row alone.

        Raises:
            ValueError: The task is of that kind.
        """
        raise ValueError(
            f"BertModule with task={self.config.task!r}: several texts share a row of this batch, and the head reads"
            " the first token of a row alone. Give each text a row of its own, or use task='masked_lm' or"
            " 'token_classification'."
        )

    def weigh(self, batch: Batch) -> Batch:
        """The batch of this replica with what is known only of the whole global batch."""
        return batch

    def labels(self, batch: Batch) -> Batch:
        """The labels of a micro-batch."""
        return {"labels": batch["labels"]} if "labels" in batch else {}

    def pad_labels(self, inputs: Batch, padding: int) -> Batch:
        """Those labels that have one for each token, for ``padding`` tokens more."""
        return {}

    def shard_labels(self, inputs: Batch, shards: SequenceShards) -> Batch:
        """This rank's part of those labels that have one for each token, under context parallelism."""
        return {}

    def parts(self, output: Any, batch: Batch) -> Parts:
        """The losses of a micro-batch."""
        raise NotImplementedError

    def join(self, parts: Parts, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum that is differentiated, and its weight."""
        ((total, count),) = parts.values()
        return total, count

    def predictions(self, output: Any, length: int, shards: SequenceShards) -> Any:
        """Logits of whole rows, without what was padded."""
        return shards.from_first(output)

    def _require(self, batch: Batch, key: str, why: str) -> torch.Tensor:
        if key not in batch:
            raise ValueError(
                f"BertModule with task={self.config.task!r} needs {key!r} ({why}); this batch has {sorted(batch)}."
                " Add it in the collate function, or choose another BertConfig(task=)."
            )
        return batch[key]


class TokenLabels(BertTask):
    """Labels ``[b, s]``, one to a token, −100 where there is none."""

    def check_shared_rows(self) -> None:
        """Texts may share a row: each token has its own output."""

    def labels(self, batch: Batch) -> Batch:
        """The labels as integers."""
        return {"labels": batch["labels"].long()} if "labels" in batch else {}

    def pad_labels(self, inputs: Batch, padding: int) -> Batch:
        """The labels; those of the tokens that are added are ignored."""
        return {"labels": F.pad(inputs["labels"], (0, padding), value=IGNORED_LABEL)} if "labels" in inputs else {}

    def shard_labels(self, inputs: Batch, shards: SequenceShards) -> Batch:
        """The labels of this rank's tokens; their number is no longer known on the host."""
        own = {"labels": shards.take(inputs["labels"], 1)} if "labels" in inputs else {}
        return {**own, "num_labels": None} if "num_labels" in inputs else own  # type: ignore[dict-item]

    def _check_labels(self, batch: Batch, classes: int, size: str) -> None:
        labels = self._require(batch, "labels", f"[b, s], {IGNORED_LABEL} where a token has none")
        check_tokens("BertModule", "labels", labels)
        if labels.shape != batch["input_ids"].shape:
            raise ValueError(
                f"BertModule: 'labels' are {tuple(labels.shape)} and the tokens {tuple(batch['input_ids'].shape)}; with"
                f" task={self.config.task!r} each token has one label. Correct the collate function."
            )
        counted = labels[labels != IGNORED_LABEL]
        check_range("BertModule", "labels", counted, classes, size)


class MaskedLM(TokenLabels):
    """Predict the tokens that were masked."""

    model = BertForMaskedLM
    asks_number_of_labels = True

    def check(self, batch: Batch) -> None:
        """Refuse labels that are no token ids."""
        self._check_labels(batch, self.config.vocab_size, "BertConfig.vocab_size")

    def parts(self, output: Any, batch: Batch) -> Parts:
        """Cross-entropy of the tokens that have a label."""
        number: Any = batch.get("num_labels")
        return {"mlm_loss": cross_entropy_over_shards(output, batch["labels"], IGNORED_LABEL, number)}

    def predictions(self, output: Any, length: int, shards: SequenceShards) -> Any:
        """``[b, s, vocab]`` over the whole vocabulary."""
        return shards.gather(gather_vocabulary(output)[..., : self.config.vocab_size], 1)[:, :length]


class Pretraining(MaskedLM):
    """Masked tokens, and whether the second sentence is the wrong one."""

    model = BertForPretraining

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

    check_shared_rows = BertTask.check_shared_rows

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


class TokenClassification(TokenLabels):
    """A class for each token."""

    model = BertForTokenClassification

    def check(self, batch: Batch) -> None:
        """Refuse labels that are no classes."""
        self._check_labels(batch, self.config.num_labels, "BertConfig.num_labels")

    def parts(self, output: torch.Tensor, batch: Batch) -> Parts:
        """Cross-entropy of the tokens that have a label."""
        return {"loss": _cross_entropy(output.flatten(0, 1), batch["labels"].flatten())}

    def predictions(self, output: torch.Tensor, length: int, shards: SequenceShards) -> Any:
        """``[b, s, num_labels]``."""
        return shards.gather(output, 1)[:, :length]


class SequenceClassification(BertTask):
    """A class, several classes or numbers for each sequence."""

    model = BertForSequenceClassification

    def check(self, batch: Batch) -> None:
        """Labels fit the problem: ``[b]`` of classes, ``[b, num_labels]`` of zeros and ones, or numbers."""
        labels = self._require(batch, "labels", "[b], or [b, num_labels]")
        problem, classes, rows = self._problem(labels), self.config.num_labels, batch["input_ids"].size(0)
        if problem == "single_label_classification":
            if labels.is_floating_point() or labels.numel() != rows:
                raise ValueError(self._misfit(problem, labels, "integers [b]"))
            counted = labels[labels != IGNORED_LABEL]
            check_range("BertModule", "labels", counted, classes, "BertConfig.num_labels")
        elif labels.numel() != rows * classes:
            raise ValueError(self._misfit(problem, labels, f"[b, {classes}]"))
        elif not bool(torch.isfinite(labels).all()):
            raise ValueError("BertModule: labels are NaN or infinite. Leave such samples out, or correct them.")
        elif problem == "multi_label_classification" and bool(((labels < 0) | (labels > 1)).any()):
            raise ValueError("BertModule: labels of a multi-label classification must be zeros and ones.")

    def parts(self, output: torch.Tensor, batch: Batch) -> Parts:
        """Cross-entropy, binary cross-entropy or squared error; each number counts once, as in transformers."""
        logits, labels = output.float(), batch["labels"]
        problem = self._problem(labels)
        if problem == "single_label_classification":
            return {"loss": _where_the_first_token_is(*_cross_entropy(logits, labels.view(-1).long()))}
        targets = labels.float().view_as(logits)
        loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        total, count = loss(logits, targets, reduction="sum"), logits.new_full((), logits.numel())
        return {"loss": _where_the_first_token_is(total, count)}

    def _problem(self, labels: torch.Tensor) -> str:
        return self.config.problem(labels.is_floating_point())

    def _misfit(self, problem: str, labels: torch.Tensor, wanted: str) -> str:
        return (
            f"BertModule: labels {tuple(labels.shape)} of {labels.dtype} do not fit {problem} with"
            f" num_labels={self.config.num_labels}, which takes {wanted}. Set BertConfig(problem_type=, num_labels=)."
        )


def _where_the_first_token_is(total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss of the rows' first tokens, which the first context-parallel rank has; nothing on the others."""
    has_it = process_groups.context_parallel().rank() == 0
    return (total, count) if has_it else (total * 0.0, count * 0)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return total, (labels != IGNORED_LABEL).sum()


TASKS: dict[BertTaskName, type[BertTask]] = {
    "masked_lm": MaskedLM,
    "pretraining": Pretraining,
    "sequence_classification": SequenceClassification,
    "token_classification": TokenClassification,
}
