"""Question answering: an answer begins at one token of a row and ends at another.

Positions mean what they mean in transformers' ``...ForQuestionAnswering``: one behind the row does not count, and a
negative one is the first token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.collectives import average_losses_across_data_parallel_group, gather_with_gradients
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models.heads.tasks import Parts, Task
from lightning_megatron.models.megatron_module import IGNORED_LABEL, Batch

START, END = "start_positions", "end_positions"  # transformers' keys, [b]
PLACES = "answer_places"  # [b, s]: each token's place in its row, −1 of a token that padding added
_WEIGHT = "end_weight"  # [b], all alike: what the end of an answer weighs, in starts


class AnswerLogits(NamedTuple):
    """Where an answer begins and where it ends.

    Args:
        start_logits: ``[b, s]``, of each token as the first one.
        end_logits: ``[b, s]``, of each token as the last one.
    """

    start_logits: torch.Tensor
    end_logits: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> AnswerLogits:
        """Both, from a linear layer's ``[s, b, 2]``."""
        return cls(*logits.permute(2, 1, 0))


class QuestionAnswering(Task):
    """The tokens at which the answer of each row begins and ends."""

    def check(self, batch: Batch) -> None:
        """Refuse a batch that does not say where each answer is."""
        rows = batch["input_ids"].size(0)
        for name, what in ((START, "begins"), (END, "ends")):
            found = self._require(batch, name, f"[b], the token at which each answer {what}")
            if found.is_floating_point() or found.dtype == torch.bool or found.numel() != rows:
                raise ValueError(
                    f"{self.module}: {name!r} is {list(found.shape)} of {found.dtype}, and the batch has {rows} rows;"
                    " it takes one integer for each row, the number of a token. Correct the collate function."
                )

    def check_shared_rows(self) -> None:
        """Texts cannot share a row, among whose tokens one answer is looked for."""
        raise ValueError(
            f"{self.module} with task='question_answering': several texts share a row of this batch, and one answer is"
            " looked for among all tokens of a row. Give each question and its text a row of its own."
        )

    def weigh(self, batch: Batch) -> Batch:
        """Add what an answer's end weighs, so that starts and ends have a mean over the whole global batch each."""
        known = self.labels(batch)
        if not known:  # a loss of the user's may need none
            return batch
        starts, ends = average_losses_across_data_parallel_group([_number(known[name]) for name in (START, END)])
        return {**batch, _WEIGHT: (starts / ends.clamp(min=1e-6)).repeat(len(batch["input_ids"]))}

    def labels(self, batch: Batch) -> Batch:
        """The positions, those behind the rows ignored, and the tokens' places."""
        if START not in batch or END not in batch:
            return {}
        tokens = batch["input_ids"]
        length = tokens.size(1)
        found = {PLACES: torch.arange(length, device=tokens.device).expand_as(tokens)}
        for name in (START, END):
            positions = batch[name].view(-1).long().clamp(0, length)
            found[name] = positions.masked_fill(positions == length, IGNORED_LABEL)
        return {**found, **{name: batch[name] for name in (_WEIGHT,) if name in batch}}

    def pad_labels(self, inputs: Batch, padding: int) -> Batch:
        """The places; the softmax leaves out the tokens that are added."""
        return {PLACES: F.pad(inputs[PLACES], (0, padding), value=-1)} if PLACES in inputs else {}

    def shard_labels(self, inputs: Batch, shards: SequenceShards) -> Batch:
        """The places of this rank's tokens."""
        return {PLACES: shards.take(inputs[PLACES], 1)} if PLACES in inputs else {}

    def parts(self, output: AnswerLogits, batch: Batch) -> Parts:
        """This rank's part of the sum, and the number of starts; their quotient is transformers' mean of two means."""
        starts, ends = _number(batch[START]), _number(batch[END])
        weight = batch[_WEIGHT][0] if _WEIGHT in batch else starts / ends.clamp(min=1)
        start, end = (
            _cross_entropy(logits, batch[name], batch[PLACES])
            for logits, name in zip(output, (START, END), strict=True)
        )
        return {"loss": ((start + weight * end) / 2, starts / process_groups.context_parallel().size())}

    def predictions(self, output: AnswerLogits, length: int, shards: SequenceShards) -> AnswerLogits:
        """``AnswerLogits``, ``[b, s]`` each."""
        return AnswerLogits(*(shards.gather(logits, 1)[:, :length] for logits in output))


def _cross_entropy(logits: torch.Tensor, positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """This rank's part of the sum over rows; a softmax runs over the tokens of all ranks that share a row."""
    group = process_groups.context_parallel()
    logits = logits.float().masked_fill(places < 0, torch.finfo(torch.float32).min)
    over_tokens = logits.logsumexp(dim=1)
    if group.size() > 1:
        over_tokens = gather_with_gradients(over_tokens, group).logsumexp(dim=0) / group.size()  # each has a share
    of_answer = torch.where(places == positions[:, None], logits, 0.0).sum(dim=1)  # 0 where another rank has the token
    return torch.where(positions == IGNORED_LABEL, 0.0, over_tokens - of_answer).sum()


def _number(positions: torch.Tensor) -> torch.Tensor:
    return (positions != IGNORED_LABEL).sum()
