"""``self.log`` and torchmetrics inside an adapter: what vanilla Lightning shows for the whole batch, on every rank."""

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from tests.reference import plain_gpt
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, OurGPT, VanillaGPT
from tests.support.pages import blocks
from tests.support.ranks import run_in_pool
from tests.support.trainer import QUIET

TRAIN, VAL, BATCH = 16, 11, 4  # rows: four batches; two and three quarters
LAYOUTS = [Layout(), Layout(tp=2, pp=2), Layout(tp=2, dp=2), Layout(pp=2, dp=2), Layout(pp=2, vp=2)]


def add_metrics(module: LightningModule) -> None:
    module.rows = SumMetric()
    module.mean_id = MeanMetric()
    module.accuracy = MulticlassAccuracy(CONFIG.vocab_size, average="micro")
    module.together = MetricCollection({"mean": MeanMetric(), "sum": SumMetric()}, prefix="all_")


def log_a_step(module: LightningModule, batch: dict[str, torch.Tensor]) -> None:
    """Values of rows that are linear in them: those of the parts of a batch give that of the whole."""
    ids = batch["labels"].float()
    module.log("mean", ids.mean(), on_step=True, on_epoch=True, sync_dist=True, batch_size=len(ids))
    module.log("default", ids.mean())
    module.log("largest", ids.max(), reduce_fx="max", on_step=False, on_epoch=True, sync_dist=True)
    module.log("count", float(len(ids)), reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
    module.log("sum_fx", float(len(ids)), reduce_fx=torch.sum, on_step=False, on_epoch=True, sync_dist=True)
    module.log_dict({"a": ids.mean(), "b": 2 * ids.mean()}, on_step=False, on_epoch=True, sync_dist=True)
    module.rows(torch.full((len(ids),), 1.0))
    module.log("rows", module.rows, on_step=True, on_epoch=True)
    module.mean_id(ids)
    module.log("mean_id", module.mean_id, on_step=False, on_epoch=True, prog_bar=True)
    module.together(ids)
    module.log_dict(module.together, on_step=False, on_epoch=True)


class VanillaLogs(VanillaGPT):
    def __init__(self) -> None:
        super().__init__()
        add_metrics(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        log_a_step(self, batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = plain_gpt.logits(CONFIG, dict(zip(self.names, self.weights, strict=True)), batch["tokens"])
        self.accuracy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("accuracy", self.accuracy)
        super().validation_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("from_a_hook", float(self.current_epoch + 1), sync_dist=True)


of_the_page: dict[str, Any] = {"torch": torch}
exec(compile(blocks("lightning.md")[0], "lightning.md", "exec"), of_the_page)


class OurLogs(OurGPT):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        add_metrics(self)

    def loss(self, output: torch.Tensor, batch: dict[str, torch.Tensor]) -> Any:
        if self.training:
            log_a_step(self, batch)
        return super().loss(output, batch)

    validation_step = of_the_page["validation_step"]

    def on_train_epoch_end(self) -> None:
        self.log("from_a_hook", float(self.current_epoch + 1), sync_dist=True)


class History(Callback):
    """What `callback_metrics` and the progress bar show after each batch and each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def _keep(self, trainer: Trainer, *_: Any) -> None:
        shown = {f"bar {name}": value for name, value in trainer.progress_bar_metrics.items()}
        shown.update(trainer.callback_metrics)
        self.seen.append({name: float(value) for name, value in shown.items()})

    on_train_batch_end = on_validation_end = on_train_epoch_end = on_fit_end = _keep


def run(layout: Layout | None, folder: str) -> dict[str, Any]:
    history = History()
    loggers = [CSVLogger(folder, name=str(layout)), TensorBoardLogger(folder, name=f"board {layout}")]
    trainer = Trainer(
        accelerator="cpu",
        devices=layout.world_size if layout else 1,
        strategy=layout.strategy(**({"num_microbatches": 2} if layout.pp == 1 else {})) if layout else "auto",
        max_epochs=2,
        callbacks=[history],
        log_every_n_steps=1,
        **{**QUIET, "logger": loggers},
    )
    module: Any = OurLogs(CONFIG) if layout else VanillaLogs()
    samples = text_samples(CONFIG, TRAIN)
    samples["loss_mask"].fill_(1)
    replicas = layout.dp if layout else 1
    rank = trainer.strategy.data_parallel_rank if layout else 0
    rows = Rows(samples)
    sampler = DistributedSampler(rows, replicas, rank, shuffle=False) if layout else SequentialSampler(rows)
    val = DataLoader(Rows(text_samples(CONFIG, VAL)), batch_size=BATCH // replicas)
    trainer.fit(module, DataLoader(rows, batch_size=BATCH // replicas, sampler=sampler), val)
    results = {"history": history.seen, "validate": trainer.validate(module, val, verbose=False)}
    results["logged"] = {name: float(value) for name, value in trainer.logged_metrics.items()}
    return results


@functools.cache
def vanilla(folder: str) -> dict[str, Any]:
    return run_in_pool(1, run, None, folder)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("logs"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logs_as_vanilla_lightning(layout, folder):
    expected = vanilla(folder)
    for seen in run_in_pool(layout.world_size, run, layout, folder):
        assert seen["validate"] == [pytest.approx(expected["validate"][0], rel=1e-5)]
        assert seen["logged"] == pytest.approx(expected["logged"], rel=1e-5)
        assert len(seen["history"]) == len(expected["history"])
        for mine, reference in zip(seen["history"], expected["history"], strict=True):
            assert mine == pytest.approx(reference, rel=1e-5)
