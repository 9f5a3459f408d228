"""Where answers begin and end in a row: what is refused, what is ignored, and the loss of rows that are padded."""

import pytest
import torch
from transformers.loss.loss_utils import ForQuestionAnsweringLoss

from lightning_megatron import BertConfig, BertModule
from lightning_megatron.models.heads.question_answering import AnswerLogits

IDS = torch.arange(1, 25).view(3, 8)
MODULE = BertModule(
    BertConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=32, seq_length=8, task="question_answering"
    )
)


@pytest.fixture(scope="module")
def process_groups():
    MODULE.build()


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"start_positions": [1, 2, 3]}, "needs 'end_positions'"),
        ({"start_positions": [1, 2, 3], "end_positions": [2, 3]}, r"'end_positions' is \[2\].*3 rows.*one integer"),
        ({"start_positions": [1.0, 2.0, 3.0], "end_positions": [2, 3, 4]}, "'start_positions' is.*float32"),
        ({"start_positions": [True, True, False], "end_positions": [2, 3, 4]}, "'start_positions' is.*bool"),
    ],
)
def test_positions_that_are_none(batch, says):
    with pytest.raises(ValueError, match=f"BertModule.*{says}"):
        MODULE.task.check({"input_ids": IDS, **{name: torch.tensor(value) for name, value in batch.items()}})


def test_batches_of_another_loss_need_no_positions():
    batch = {"input_ids": IDS, "spans": IDS}
    assert MODULE.task.weigh(batch) == batch


@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        ([1, 4, 0], [3, 7, 0]),
        ([8, 4, 2], [300, 9, 6]),
        ([-100, 2, -1], [5, 6, -1]),
        ([[1], [4], [8]], [[2], [9], [7]]),
    ],
)
def test_the_loss_is_transformers(starts, ends, process_groups):
    starts, ends = torch.tensor(starts), torch.tensor(ends)
    logits = AnswerLogits(torch.randn(3, 8), torch.randn(3, 8))
    labels = MODULE.task.labels({"input_ids": IDS, "start_positions": starts, "end_positions": ends})
    padded = {**labels, **MODULE.task.pad_labels(labels, 3)}
    wide = AnswerLogits(*(torch.cat([each, torch.full((3, 3), 9.0)], 1) for each in logits))
    expected = ForQuestionAnsweringLoss(*logits, starts, ends)
    for output, inputs in ((logits, labels), (wide, padded)):
        total, count = MODULE.loss(output, inputs)
        torch.testing.assert_close(total / count, expected)


def test_a_batch_that_is_predicted_needs_no_positions():
    assert MODULE.task.labels({"input_ids": IDS}) == {}
    assert MODULE.task.pad_labels({}, 3) == {}
