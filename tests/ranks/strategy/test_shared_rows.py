"""Ranks that share the tokens of each row (cp): what users log, see and get back is what one process gives."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_megatron import BertConfig, BertModule, GPTModule, MegatronModule, T5Config, T5Module
from lightning_megatron.distributed.collectives import sum_over_parts_of_rows
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, OurGPT, trainer_of
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import loader

LENGTH = CONFIG.seq_length - 1  # no multiple of 2·cp: rows are padded, and nobody sees it
LAYOUTS = [Layout(cp=2), Layout(cp=2, dp=2)]


def samples(rows: int) -> dict[str, torch.Tensor]:
    return {name: value[:, :LENGTH].clone() for name, value in text_samples(CONFIG, rows).items()}


class Logs(OurGPT):
    """Logs numbers of whole rows and of its own tokens, by numbers and by metrics, in steps and in hooks."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.nll, self.correct, self.accuracy = MeanMetric(), SumMetric(), MulticlassAccuracy(CONFIG.vocab_size)
        self.rows, self.shapes = SumMetric(), set()

    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        total, count = super().loss(output, batch)
        mean = total.detach() / count.clamp(min=1)
        self.log("own_mean", mean, batch_size=count, on_step=True, on_epoch=True)
        self.log("own_least", -mean * 0 + 1 / count.clamp(min=1), reduce_fx="min")
        self.log("own_tokens", sum_over_parts_of_rows(count), reduce_fx="sum", on_step=True, on_epoch=False)
        self.nll.update(mean, weight=count)
        self.log("own_nll", self.nll, on_step=False, on_epoch=True)
        return total, count

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("rows", float(len(batch["tokens"])), reduce_fx="sum", on_step=True, on_epoch=False)
        self.log("ids", batch["labels"].float().mean())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.predict_step(batch, batch_idx)
        if self.on_last_stage:
            guessed = logits.argmax(2)
            self.correct.update((guessed == batch["labels"]).sum())
            self.accuracy(guessed.flatten(), batch["labels"].flatten())
            self.log("correct", self.correct)
            self.log("accuracy", self.accuracy)
        return super().validation_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.shapes.add(tuple(batch["tokens"].shape[1:]))
        self.rows.update(float(len(batch["tokens"])))
        self.log("rows_of_metric", self.rows, on_step=True, on_epoch=False)
        self.log("rows_in_hook", float(len(batch["tokens"])), reduce_fx="sum", sync_dist=True)
        self.log("ids_in_hook", batch["labels"].float().mean(), sync_dist=True)
        rows = torch.tensor(float(len(batch["tokens"])))
        self.log("rows_reduced", self.trainer.strategy.reduce(rows.clone(), reduce_op="sum"))
        self.log("rows_gathered", self.all_gather(rows).sum())


class Kept(Callback):
    """What was logged after each batch and each validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, run: Any, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in run.callback_metrics.items() if name != "own_least"})

    on_validation_end = on_train_batch_end


def _log(layout: Layout) -> Any:
    kept, module = Kept(), Logs(CONFIG)
    run = trainer_of(layout, ".", callbacks=[kept], limit_val_batches=1.0, max_steps=3, val_check_interval=3)
    data = Rows(samples(7))
    run.fit(module, loader(Rows(samples(12)), layout, 4, run), DataLoader(data, batch_size=4 // layout.dp))
    return kept.seen, module.shapes


@pytest.fixture(scope="module")
def logged_by_one() -> Any:
    return run_in_pool(1, _log, Layout())[0][0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_logged_is_that_of_one_process(layout, logged_by_one):
    for seen, shapes in run_in_pool(layout.world_size, _log, layout):
        assert shapes == {(LENGTH,)}, "hooks see whole rows, without padding"
        for mine, reference in zip(seen, logged_by_one, strict=True):
            assert mine == pytest.approx(reference, rel=1e-5)


def _of_lengths(layout: Layout) -> Any:
    """Losses of a training, and the shapes of predictions, on batches of a length each."""
    kept, module = Kept(), OurGPT(CONFIG)
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, CONFIG.vocab_size, (4, length + 1), generator=generator) for length in (1, 2, 5, 16, 13)]
    data = DataLoader([{"tokens": each[:, :-1], "labels": each[:, 1:]} for each in ids], batch_size=None)
    run = trainer_of(layout, ".", callbacks=[kept], max_steps=len(ids))
    run.fit(module, data)
    return [each["train_loss"] for each in kept.seen], [tuple(each.shape) for each in run.predict(module, data)]


@pytest.mark.parametrize("layout", [Layout(cp=4), Layout(cp=2, tp=2, sp=True)], ids=str)
def test_rows_may_be_shorter_than_there_are_parts(layout):
    ((losses, shapes),) = run_in_pool(1, _of_lengths, Layout())
    for seen in run_in_pool(layout.world_size, _of_lengths, layout):
        assert seen[0] == pytest.approx(losses, rel=1e-5)
        assert seen[1] == shapes


SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 64, "seq_length": 16}


def _predicting(kind: str) -> tuple[MegatronModule, dict[str, torch.Tensor]]:
    """A module, and seven rows of eleven tokens, of which the last ones are padding in some."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 64, (7, 11), generator=generator)
    keep = (torch.arange(11) < 11 - torch.arange(7)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": keep}
    if kind == "t5":
        config = T5Config(
            num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=64, seq_length=16, decoder_seq_length=16
        )
        return T5Module(config), {**batch, "decoder_input_ids": ids[:, :5].clone()}
    return BertModule(BertConfig(**SIZES, task=kind)), batch


def _predict(layout: Layout) -> dict[str, Any]:
    found = {}
    for kind in ("masked_lm", "pretraining", "sequence_classification", "question_answering", "t5"):
        module, rows = _predicting(kind)
        found[kind] = trainer_of(layout, ".").predict(module, DataLoader(Rows(rows), batch_size=4))
    return found


def test_predictions_are_whole_rows_on_every_rank():
    (expected,) = run_in_pool(1, _predict, Layout())
    for seen in run_in_pool(2, _predict, Layout(cp=2)):
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


class HasOwnTensor(GPTModule):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("own", torch.zeros(3))


def _save(path: str) -> None:
    run, module = trainer_of(Layout(cp=2, dp=2), ".", max_steps=1), HasOwnTensor(CONFIG)
    module.own += 7
    run.fit(module, loader(Rows(samples(4)), Layout(dp=2), 4, run))
    run.save_checkpoint(path)


def test_a_tensor_beside_the_model_is_saved_and_loaded(tmp_path):
    run_in_pool(4, _save, f"{tmp_path}/own.ckpt")
    assert HasOwnTensor.load_from_checkpoint(f"{tmp_path}/own.ckpt").own.tolist() == [7.0] * 3


class Mean(OurGPT):
    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        total, count = super().loss(output, batch)
        return total / count


def _fit_mean(evaluates: bool) -> None:
    run, data = trainer_of(Layout(cp=2), "."), DataLoader(Rows(samples(4)), batch_size=4)
    (run.validate if evaluates else run.fit)(Mean(CONFIG), data)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_mean_over_a_part_of_the_tokens_is_refused(evaluates):
    with pytest.raises(RankError, match="plain mean.*cp=2.*Return the sum over tokens and their number"):
        run_ranks(2, _fit_mean, evaluates, timeout=60)
