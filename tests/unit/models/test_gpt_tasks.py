"""Tasks of a GPT with labels: what is refused, where a row's last token is, and what experts count."""

import pytest
import torch

from lightning_megatron import Experts, GPTConfig, GPTModule, LoRA, ParallelLayout
from lightning_megatron.models.flops import training_flops
from lightning_megatron.models.gpt.tasks import last_tokens
from tests.support.built import built

SIZES = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 65, "seq_length": 16}
IDS = torch.arange(1, 25).view(3, 8)


def config(task: str = "sequence_classification", **options) -> GPTConfig:
    return GPTConfig(**{**SIZES, "task": task, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "sequence_clasification"}, "Did you mean 'sequence_classification'"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"problem_type": "multi_label"}, "Did you mean 'multi_label_classification'"),
        ({"task": "token_classification", "problem_type": "regression"}, "only task='sequence_classification'"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "one class teaches nothing"),
        ({"mtp": 1, "position_embedding": "rope"}, "mtp=1.*Use mtp=0"),
        ({"task": "question_answering", "num_labels": 3}, "Use num_labels=2"),
        ({"classifier_dropout": 1.0}, "classifier_dropout=1.0"),
        ({"pad_token_id": -1}, "pad_token_id=-1"),
    ],
)
def test_configurations_that_do_not_exist(options, says):
    with pytest.raises(ValueError, match=says):
        config(**options)


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [
        ("sequence_classification", {"reset_attention_mask": True}, "one label to a row"),
        ("question_answering", {"reset_position_ids": True}, "one label to a row, or one answer"),
        ("token_classification", {"eod_mask_loss": True}, "labels of its own"),
    ],
)
def test_options_of_documents_are_refused(task, options, says):
    with pytest.raises(ValueError, match=says):
        GPTModule(config(task), eod_id=3, **options)


def test_terms_of_a_loss_over_the_vocabulary_are_refused():
    module = GPTModule(config(), label_smoothing=0.1)
    with pytest.raises(ValueError, match="task='sequence_classification' has none"):
        module.check_layout(ParallelLayout(world_size=1))


class _Trainer:
    predicting = False


@pytest.mark.parametrize(
    ("options", "batch", "says"),
    [
        ({}, {"tokens": IDS, "labels": IDS}, "needs 'input_ids'"),
        ({}, {"input_ids": IDS}, r"needs 'labels' \(\[b\], or \[b, num_labels\]\)"),
        ({}, {"input_ids": IDS, "labels": torch.tensor([0, 1, 2])}, "2 in 'labels' is outside of 0 to 1"),
        ({}, {"input_ids": IDS, "labels": torch.zeros(3, 5)}, r"do not fit multi_label.*takes \[b, 2\]"),
        ({"num_labels": 1}, {"input_ids": IDS, "labels": torch.tensor([0.0, 1.0, float("nan")])}, "NaN"),
        ({"num_labels": 3}, {"input_ids": IDS, "labels": torch.full((3, 3), 2.0)}, "zeros and ones"),
        ({"vocab_size": 20}, {"input_ids": IDS, "labels": torch.zeros(3).long()}, "token id 24"),
        (
            {}, {"input_ids": IDS, "labels": torch.zeros(3).long(), "seq_idx": (IDS > 12).long()},
            "several texts share a row.*Give each text a row of its own",
        ),
        (
            {}, {"input_ids": IDS, "labels": torch.zeros(3).long(), "position_ids": torch.arange(8).expand(3, 8) % 5},
            "several texts share a row",
        ),
        (
            {"task": "question_answering"}, {"input_ids": IDS, "start_positions": IDS[:, 0], "labels": IDS[:, 0]},
            "needs 'end_positions'",
        ),
        (
            {"task": "question_answering"},
            {"input_ids": IDS, "start_positions": IDS[:, 0], "end_positions": IDS[:, 0], "seq_idx": (IDS > 12).long()},
            "several texts share a row.*Give each question and its text a row of its own",
        ),
        ({"task": "token_classification"}, {"input_ids": IDS, "labels": torch.zeros(3).long()}, "labels"),
        ({"task": "token_classification"}, {"input_ids": IDS, "labels": IDS}, "24|2 in 'labels' is outside"),
    ],
)  # fmt: skip
def test_batches_that_are_refused(options, batch, says):
    module = GPTModule(config(**options))
    module._trainer = _Trainer()
    with pytest.raises(ValueError, match=says):
        module.check_batch(batch)


def test_texts_may_share_a_row_where_each_token_has_a_label():
    module = GPTModule(config("token_classification"))
    module._trainer = _Trainer()
    module.check_batch({"input_ids": IDS, "labels": IDS % 2, "seq_idx": (IDS > 12).long()})


def test_the_last_token_of_each_row():
    ids = torch.tensor([[5, 6, 0, 0], [0, 0, 7, 8], [5, 0, 6, 7], [5, 0, 0, 0], [0, 0, 0, 0], [4, 4, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert last_tokens({"input_ids": ids, "attention_mask": mask}, 0).tolist() == [1, 3, 3, 0, 0, 3]
    assert last_tokens({"input_ids": ids, "attention_mask": mask}, None).tolist() == [2, 3, 3, 0, 0, 1]
    assert last_tokens({"input_ids": ids}, None).tolist() == [3] * 6


class _OwnBatch(GPTModule):
    def get_batch(self, batch):
        places = torch.arange(8).expand(3, 8)
        return {"input_ids": batch["tokens"], "position_ids": places, "attention_mask": None}


def test_an_own_get_batch_need_not_say_where_rows_end():
    ids = IDS.clone()
    ids[0, 5:] = 0
    plain = built(GPTModule(config(pad_token_id=0))).eval()
    own = built(_OwnBatch(config(pad_token_id=0))).eval()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids), own(tokens=ids))


def test_experts_count_what_rows_count():
    experts = {"bias": False, "experts": Experts(num=4, top_k=2)}
    ids = torch.tensor([[5, 6, 7, 0], [1, 2, 3, 4]])
    classes = built(GPTModule(config(pad_token_id=0, **experts)))
    weights = classes._fitted(classes.get_batch({"input_ids": ids, "labels": torch.tensor([1, -100])}))["token_weights"]
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0], [0.0] * 4]))
    numbers = built(GPTModule(config(pad_token_id=0, num_labels=5, **experts)))
    weights = numbers._fitted(numbers.get_batch({"input_ids": ids, "labels": torch.zeros(2, 5)}))["token_weights"]
    torch.testing.assert_close(weights.sum(dim=1), torch.tensor([5.0, 5.0]))
    tokens = built(GPTModule(config("token_classification", **experts)))
    weights = tokens._fitted(tokens.get_batch({"input_ids": ids, "labels": ids % 2 - 100 * (ids == 0)}))
    assert weights["token_weights"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    answers = built(GPTModule(config("question_answering", **experts)))
    batch = {"input_ids": ids, "start_positions": torch.tensor([1, 9]), "end_positions": torch.tensor([2, 9])}
    weights = answers._fitted(answers.get_batch({**batch, "attention_mask": (ids != 0).long()}))["token_weights"]
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0], [0.0] * 4]))


@pytest.mark.parametrize(
    ("task", "labels"), [("sequence_classification", 3), ("token_classification", 3), ("question_answering", 2)]
)
@pytest.mark.parametrize("trains", [None, True])
def test_the_head_is_counted(task, labels, trains):
    shape = config(task, num_labels=labels)
    head = "qa_outputs" if task == "question_answering" else "classification_head"
    lora = trains and LoRA(rank=4, also_train=[head])
    weights = list(built(GPTModule(shape, lora=lora)).parameters())
    told = ParallelLayout(world_size=1).memory(shape, precision="32-true", lora=lora, device="cpu").largest
    assert told.weights == 4 * sum(each.numel() for each in weights)
    assert told.gradients == 4 * sum(each.numel() for each in weights if each.requires_grad)
    assert told.logits < 3 * 16 * 4 * 2


def test_the_work_of_a_head_is_that_of_its_labels():
    causal, classes = training_flops(config("causal_lm"), (16,)), training_flops(config(num_labels=5), (16,))
    assert causal - classes == 3 * 2 * 16 * 24 * (65 - 5)
