"""The labels of a head: what a batch has of them, the loss, and what is predicted. Families add their own tasks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models.batch_checks import check_range, check_tokens
from lightning_megatron.models.heads import settings
from lightning_megatron.models.megatron_module import IGNORED_LABEL, Batch

# Sum and count, by the name under which the mean is logged; "loss" has its own logging.
Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Task:
    """What a model is trained for, and what its labels mean.

    Args:
        config: Configuration of the model.
    """

    asks_number_of_labels = False  # whether the loss uses ``num_labels``, which the host then counts in a batch

    def __init__(self, config: Any) -> None:
        self.config = config
        self.module, self.settings = f"{config.kind}Module", type(config).__name__  # as errors call them

    def check(self, batch: Batch) -> None:
        """Refuse labels that the task cannot learn from; ``batch`` has transformers' keys.

        Raises:
            ValueError: A value is wrong; the message has it.
        """
        raise NotImplementedError

    def check_shared_rows(self) -> None:
        """Refuse rows that several texts share, where the head reads one token of a row alone.

        Raises:
            ValueError: The task is of that kind.
        """
        raise ValueError(
            f"{self.module} with task={self.config.task!r}: several texts share a row of this batch, and the head reads"
            " one token of a row alone. Give each text a row of its own, or use a task with a label to each token."
        )

    def weigh(self, batch: Batch) -> Batch:
        """The batch of this replica with what is known only of the whole global batch."""
        return batch

    def labels(self, batch: Batch) -> Batch:
        """The labels of a micro-batch."""
        return {"labels": batch["labels"]} if "labels" in batch else {}

    def complete(self, inputs: Batch) -> Batch:
        """What ``get_batch`` returned, with what the head reads and an overridden one may leave out."""
        return inputs

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
        raise NotImplementedError

    def _require(self, batch: Batch, key: str, why: str) -> torch.Tensor:
        if key not in batch:
            raise ValueError(
                f"{self.module} with task={self.config.task!r} needs {key!r} ({why}); this batch has {sorted(batch)}."
                f" Add it in the collate function, or choose another {self.settings}(task=)."
            )
        return batch[key]


class TokenLabels(Task):
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
        check_tokens(self.module, "labels", labels)
        if labels.shape != batch["input_ids"].shape:
            raise ValueError(
                f"{self.module}: 'labels' are {tuple(labels.shape)} and the tokens {tuple(batch['input_ids'].shape)};"
                f" with task={self.config.task!r} each token has one label. Correct the collate function."
            )
        counted = labels[labels != IGNORED_LABEL]
        check_range(self.module, "labels", counted, classes, f"{self.settings}.{size}")


class TokenClassification(TokenLabels):
    """A class for each token."""

    def check(self, batch: Batch) -> None:
        """Refuse labels that are no classes."""
        self._check_labels(batch, self.config.num_labels, "num_labels")

    def parts(self, output: torch.Tensor, batch: Batch) -> Parts:
        """Cross-entropy of the tokens that have a label."""
        return {"loss": cross_entropy(output.flatten(0, 1), batch["labels"].flatten())}

    def predictions(self, output: torch.Tensor, length: int, shards: SequenceShards) -> Any:
        """``[b, s, num_labels]``."""
        return shards.gather(output, 1)[:, :length]


class SequenceClassification(Task):
    """A class, several classes or numbers for each sequence; all ranks that share a row have its logits."""

    def check(self, batch: Batch) -> None:
        """Labels fit the problem: ``[b]`` of classes, ``[b, num_labels]`` of zeros and ones, or numbers."""
        labels = self._require(batch, "labels", "[b], or [b, num_labels]")
        problem, classes, rows = self._problem(labels), self.config.num_labels, batch["input_ids"].size(0)
        if problem == "single_label_classification":
            if labels.is_floating_point() or labels.numel() != rows:
                raise ValueError(self._misfit(problem, labels, "integers [b]"))
            counted = labels[labels != IGNORED_LABEL]
            check_range(self.module, "labels", counted, classes, f"{self.settings}.num_labels")
        elif labels.numel() != rows * classes:
            raise ValueError(self._misfit(problem, labels, f"[b, {classes}]"))
        elif not bool(torch.isfinite(labels).all()):
            raise ValueError(f"{self.module}: labels are NaN or infinite. Leave such samples out, or correct them.")
        elif problem == "multi_label_classification" and bool(((labels < 0) | (labels > 1)).any()):
            raise ValueError(f"{self.module}: labels of a multi-label classification must be zeros and ones.")

    def parts(self, output: torch.Tensor, batch: Batch) -> Parts:
        """Cross-entropy, binary cross-entropy or squared error; each number counts once, as in transformers."""
        logits, labels = output.float(), batch["labels"]
        problem = self._problem(labels)
        if problem == "single_label_classification":
            return {"loss": self.part_of_rank(*cross_entropy(logits, labels.view(-1).long()))}
        targets = labels.float().view_as(logits)
        loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        total, count = loss(logits, targets, reduction="sum"), logits.new_full((), logits.numel())
        return {"loss": self.part_of_rank(total, count)}

    def part_of_rank(self, total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A loss of whole rows as the part that this rank adds to the sum over the ranks that share the rows."""
        size = process_groups.context_parallel().size()
        return total / size, count / size

    def predictions(self, output: torch.Tensor, length: int, shards: SequenceShards) -> Any:
        """``[b, num_labels]``."""
        return output

    def _problem(self, labels: torch.Tensor) -> str:
        return settings.problem(self.config, labels.is_floating_point())

    def _misfit(self, problem: str, labels: torch.Tensor, wanted: str) -> str:
        return (
            f"{self.module}: labels {tuple(labels.shape)} of {labels.dtype} do not fit {problem} with"
            f" num_labels={self.config.num_labels}, which takes {wanted}. Set {self.settings}(problem_type=,"
            " num_labels=)."
        )


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over labels ``[n]`` that are not ignored, of logits ``[n, classes]``, and their number."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return total, (labels != IGNORED_LABEL).sum()
