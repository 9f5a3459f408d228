"""What a BertModule takes (transformers' collators, Megatron's datasets), refuses, logs and draws."""

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import (
    BatchEncoding,
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from lightning_megatron import BertConfig, BertModule
from tests.reference import plain_bert
from tests.reference.parallel_bert import LoadedBert
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import Logged, loader, trainer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(206))]
LAYOUTS = [Layout(), Layout(tp=2, sp=True), Layout(pp=2)]


def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)})


def tokenised(task: str) -> list[dict]:
    g, found, tokenize = torch.Generator().manual_seed(2), [], tokenizer()
    for i in range(8):
        words = [f"w{int(n)}" for n in torch.randint(206, (9 + i % 4,), generator=g)]
        sample = dict(tokenize(" ".join(words[:5]), " ".join(words[5:])))
        if task == "classes":
            sample["label"] = i % 3
        if task == "tokens":
            sample["labels"] = [n % 4 for n in sample["input_ids"]]
        found.append(sample)
    return found


COLLATORS: dict[str, Any] = {
    "masked_lm": functools.partial(DataCollatorForLanguageModeling, mlm_probability=0.4),
    "classes": DataCollatorWithPadding,
    "tokens": DataCollatorForTokenClassification,
}


def collate(task: str, samples: list[dict]) -> Any:
    torch.manual_seed(1)  # masks alike each time
    return COLLATORS[task](tokenizer())(samples)


def _collated(task: str, layout: Layout) -> dict:
    batch = collate(task, tokenised(task))
    model = plain_bert.new_model(task)
    with torch.no_grad():
        expected = model(**batch)
    data = DataLoader(tokenised(task), batch_size=8, collate_fn=functools.partial(collate, task))
    run, module = trainer(layout), LoadedBert(task)
    predicted = run.predict(module, data)[0]
    loss = run.validate(module, data, verbose=False)[0]["val_loss"]
    return {"type": type(batch), "logits": (predicted, expected.logits), "loss": (loss, float(expected.loss))}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("task", COLLATORS)
def test_batches_as_transformers_collators_make_them(task, layout):
    for seen in run_in_pool(layout.world_size, _collated, task, layout):
        assert task == "tokens" or issubclass(seen["type"], BatchEncoding)  # a Mapping, not a dict
        torch.testing.assert_close(*seen["logits"], rtol=0, atol=1e-5)
        assert seen["loss"][0] == pytest.approx(seen["loss"][1], rel=1e-5)


def megatron(sample: dict) -> dict:
    """The same sample as Megatron's datasets name it; labels that the mask leaves out are any id."""
    counted = sample["labels"] != -100
    return {
        "text": sample["input_ids"],
        "types": sample["token_type_ids"],
        "labels": sample["labels"].where(counted, 5),
        "loss_mask": counted.long(),
        "padding_mask": sample["attention_mask"],
        "is_random": sample["next_sentence_label"],
        "truncated": torch.tensor(0),
    }


def _megatron_keys(layout: Layout) -> dict:
    run, watch = trainer(layout, max_steps=3), Logged()
    run.callbacks.append(watch)
    samples = [megatron(sample) for sample in plain_bert.samples("pretraining", 12, 3)]
    run.fit(LoadedBert("pretraining"), loader(samples, layout, 12, run))
    return {"losses": [step["train_loss"] for step in watch.steps]}


@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(dp=2)], ids=str)
def test_batches_as_megatron_datasets_make_them(layout):
    expected = plain_bert.train("pretraining", 12, 3)["losses"]
    for seen in run_in_pool(layout.world_size, _megatron_keys, layout):
        assert seen["losses"] == pytest.approx(expected, rel=1e-5)


class Measured(LoadedBert):
    """Accuracy and F1 of the classes."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.f1 = MulticlassF1Score(3)

    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        self.accuracy(output.argmax(-1), batch["labels"])
        self.f1(output.argmax(-1), batch["labels"])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("f1", self.f1, on_step=False, on_epoch=True)
        return super().loss(output, batch)


def _measure(name: str, layout: Layout, rows: int) -> dict:
    run = trainer(layout)
    module = Measured(name) if name == "classes" else LoadedBert(name)
    samples = plain_bert.samples(name, rows, 1)
    return run.validate(module, loader(samples, layout, 8, run), verbose=False)[0]


MEASURED = [Layout(), Layout(tp=2, dp=2, sp=True), Layout(pp=2, dp=2), Layout(pp=2, vp=2)]


@pytest.mark.parametrize("layout", MEASURED, ids=str)
def test_metrics_and_a_ragged_tail(layout):
    rows = 19  # two batches of 8 and a tail of 3; two replicas share 19 samples unevenly
    (batch,) = plain_bert.batches("classes", rows, 1)
    with torch.no_grad():
        output = plain_bert.new_model("classes")(**batch)
    guess = output.logits.argmax(-1)
    f1 = MulticlassF1Score(3)(guess, batch["labels"])
    for seen in run_in_pool(layout.world_size, _measure, "classes", layout, rows):
        assert seen["val_loss"] == pytest.approx(float(output.loss), rel=1e-5)
        assert seen["accuracy"] == pytest.approx(float((guess == batch["labels"]).float().mean()))
        assert seen["f1"] == pytest.approx(float(f1))


@pytest.mark.parametrize("layout", MEASURED, ids=str)
def test_the_two_losses_of_an_evaluation(layout):
    rows = 20
    (batch,) = plain_bert.batches("pretraining", rows, 1)
    with torch.no_grad():
        output = plain_bert.new_model("pretraining")(**batch)
    mlm = torch.nn.functional.cross_entropy(output.prediction_logits.flatten(0, 1), batch["labels"].flatten())
    sop = torch.nn.functional.cross_entropy(output.seq_relationship_logits, batch["next_sentence_label"])
    for seen in run_in_pool(layout.world_size, _measure, "pretraining", layout, rows):
        assert seen["val_mlm_loss"] == pytest.approx(float(mlm), rel=1e-5)
        assert seen["val_sop_loss"] == pytest.approx(float(sop), rel=1e-5)
        assert seen["val_loss"] == pytest.approx(float(mlm + sop), rel=1e-3)  # of three batches, by their tokens


def _options(name: str, layout: Layout, accumulate: int, reduction: str, **strategy: Any) -> list[float]:
    module, watch = LoadedBert(name, loss_reduction=reduction), Logged()
    run = trainer(layout, strategy, max_steps=4, accumulate_grad_batches=accumulate, callbacks=[watch])
    samples = plain_bert.samples(name, 12, 4)
    run.fit(module, loader(samples, layout, 12 // accumulate, run))
    expected = plain_bert.train(name, 12, 4)
    return [module.distance(expected["weights"]), watch.steps[0]["train_loss"]]


@pytest.mark.parametrize("layout", [Layout(tp=2, dp=2), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("name", ["masked_lm", "classes"])
def test_accumulation_is_one_big_batch(name, layout):
    for distance, _ in run_in_pool(layout.world_size, _options, name, layout, 2, "token"):
        assert distance < 1e-4


def test_a_mean_of_micro_batches():
    (batch, *_) = plain_bert.batches("pretraining", 12, 4)
    with torch.no_grad():
        model = plain_bert.new_model("pretraining")
        parts = [model(**{k: v[i : i + 3] for k, v in batch.items()}).loss for i in range(0, 12, 3)]
    mean, whole = float(torch.stack(parts).mean()), plain_bert.train("pretraining", 12, 4)["losses"][0]
    assert mean != pytest.approx(whole, rel=1e-5)
    train = functools.partial(_options, micro_batch_size=3)
    for _, loss in run_in_pool(2, train, "pretraining", Layout(pp=2), 1, "micro_batch"):
        assert loss == pytest.approx(mean, rel=1e-5)


class Dropping(LoadedBert):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.config = BertConfig(**{**vars(self.config), "hidden_dropout": 0.3, "attention_dropout": 0.3})


def _drop(name: str, layout: Layout) -> dict:
    module, watch = Dropping(name), Logged()
    run = trainer(layout, max_steps=4, callbacks=[watch])
    run.fit(module, loader(plain_bert.samples(name, 12, 4), layout, 12, run))
    alike = {n: p.detach() for n, p in module.named_shards() if not getattr(p, "tensor_model_parallel", False)}
    return {"alike": alike, "losses": [step["train_loss"] for step in watch.steps]}


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("name", ["pretraining", "classes", "tokens"])
def test_dropout_leaves_replicated_weights_alike(name, sp):
    first, second = run_in_pool(2, _drop, name, Layout(tp=2, sp=sp))
    assert first["losses"] == second["losses"]
    assert first["losses"] != pytest.approx(plain_bert.train(name, 12, 4)["losses"], rel=1e-4)
    for key, value in first["alike"].items():
        torch.testing.assert_close(value, second["alike"][key], rtol=0, atol=1e-7)


def _refused(name: str, change: str) -> None:
    samples = plain_bert.samples(name, 12, 1)
    row = samples[5]
    if change == "no labels":
        samples = [{k: v for k, v in sample.items() if k != "labels"} for sample in samples]
    elif change == "no pairs":
        samples = [{k: v for k, v in sample.items() if k != "next_sentence_label"} for sample in samples]
    elif change == "ids":
        row["input_ids"][4] = 211
    elif change == "types":
        row["token_type_ids"][4] = 2
    elif change == "labels":
        row["labels"] = torch.full_like(row["labels"], 211)
    elif change == "floating":
        samples = [{**sample, "labels": torch.zeros(2)} for sample in samples]
    elif change == "keys":
        samples = [{"ids": sample["input_ids"]} for sample in samples]
    elif change == "length":
        samples = [{**sample, "input_ids": torch.ones(38, dtype=torch.long)} for sample in samples]
    run = trainer(Layout(pp=2), max_steps=1)
    run.fit(LoadedBert(name), DataLoader(samples, batch_size=12))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("masked_lm", "no labels", "needs 'labels'.*input_ids"),
        ("pretraining", "no pairs", "needs 'next_sentence_label'.*is_random"),
        ("masked_lm", "ids", "211 in 'input_ids' is outside of 0 to 210"),
        ("masked_lm", "types", "2 in 'token_type_ids' is outside of 0 to 1"),
        ("masked_lm", "labels", "211 in 'labels' is outside of 0 to 210"),
        ("classes", "labels", "211 in 'labels' is outside of 0 to 2, as BertConfig.num_labels=3"),
        ("classes", "floating", "labels .12, 2. of torch.float32 do not fit multi_label_classification.*num_labels=3"),
        ("masked_lm", "keys", "'input_ids'.*\\['ids'\\]"),
        ("masked_lm", "length", "sequences of 38 tokens.*seq_length=37"),
    ],
)
def test_every_rank_says_what_is_wrong(name, change, message):
    with pytest.raises(RankError, match=message) as error:
        run_ranks(2, _refused, name, change, timeout=40)
    assert "gave no result" not in str(error.value)


ODD_BATCHES = {
    "input_ids of floats": ({"input_ids": torch.ones(2, 4)}, "'input_ids' is .2, 4. of torch.float32"),
    "input_ids without rows": ({"input_ids": torch.arange(4)}, "'input_ids' is .4. of torch.int64"),
    "no token": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "'input_ids' is .2, 0."),
    "a list": ({"input_ids": [[1, 2]]}, "'input_ids' is a list"),
    "positions": ({"position_ids": torch.full((2, 4), 400)}, "400 in 'position_ids' is outside"),
    "loss_mask": ({"loss_mask": torch.ones(2, 3)}, "'loss_mask' is .2, 3. and 'labels' .2, 4."),
    "labels of floats": ({"labels": torch.ones(2, 4)}, "'labels' is .2, 4. of torch.float32"),
    "pairs": ({"next_sentence_label": torch.zeros(2, 2, dtype=torch.long)}, "'next_sentence_label' is .2, 2."),
}


@pytest.mark.parametrize("name", ODD_BATCHES)
def test_odd_batches_are_named(name):
    changes, message = ODD_BATCHES[name]
    ids = torch.arange(8).view(2, 4)
    batch = {"input_ids": ids, "labels": ids, "next_sentence_label": torch.zeros(2, dtype=torch.long), **changes}
    sizes = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "vocab_size": 50, "seq_length": 8}
    module = BertModule(BertConfig(**sizes, task="pretraining"))
    module.trainer = Trainer(accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match=message):
        module.check_batch(batch)


def test_transformers_name_wins_over_megatrons():
    sizes = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "vocab_size": 50, "seq_length": 8}
    module = BertModule(BertConfig(**sizes, task="masked_lm"))
    module.trainer = Trainer(accelerator="cpu", logger=False)
    ids = torch.arange(8).view(2, 4)
    module.check_batch({"input_ids": ids, "labels": ids, "text": ["a raw", "column"]})


@pytest.mark.parametrize(
    ("problem", "labels"),
    [("regression", [float("nan"), 1.0]), ("multi_label_classification", [[1.0, float("nan")], [0.0, 1.0]])],
)
def test_labels_that_are_no_numbers(problem, labels):
    sizes = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "vocab_size": 50, "seq_length": 8}
    count = 1 if problem == "regression" else 2
    config = BertConfig(**sizes, task="sequence_classification", problem_type=problem, num_labels=count)
    module = BertModule(config)
    module.trainer = Trainer(accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match="NaN or infinite"):
        module.check_batch({"input_ids": torch.arange(8).view(2, 4), "labels": torch.tensor(labels)})
