"""What hooks between the steps log on some stages or replicas only is on every rank, as vanilla Lightning has it."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler
from torchmetrics import MeanMetric

from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, OurGPT, VanillaGPT, trainer_of
from tests.support.ranks import run_ranks

ROWS = 12  # three batches of four, for training and for validation


class Collects:
    """Collects in the steps, on the last stage, and logs in every hook what it has."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[torch.Tensor] = []
        self.ids, self.now = MeanMetric(), MeanMetric()
        self.shown: list[dict[str, float]] = []

    def collect(self, batch: Any) -> None:
        if getattr(self, "on_last_stage", True):
            self.seen.append(batch["labels"].float().mean(1))
            self.ids(batch["labels"].float())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.collect(batch)
        if getattr(self, "on_last_stage", True):
            self.now(batch["labels"].float())
            self.log("now", self.now, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)  # runs training_step
        if self.seen:
            self.log("stepped", self.mean())

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.collect(batch)
        return super().validation_step(batch, batch_idx)

    def mean(self) -> torch.Tensor:
        return torch.cat(self.seen).mean()

    def on_train_start(self) -> None:
        if self.trainer.is_global_zero:
            self.log("from_rank_0", 3.0, rank_zero_only=True)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.seen:
            self.log("before_step", self.mean(), prog_bar=True)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.seen:
            self.log("after_batch", self.mean(), on_step=True, on_epoch=True, sync_dist=True)
            self.log("rows", float(sum(map(len, self.seen))), reduce_fx="sum", sync_dist=True)

    def on_train_epoch_start(self) -> None:
        self.seen.clear()

    def on_validation_epoch_start(self) -> None:
        self.seen.clear()
        self.ids.reset()

    def on_validation_epoch_end(self) -> None:
        self.log("guarded", self.mean() if self.seen else 0.0, sync_dist=True)
        if self.seen:
            self.log_dict({"a": self.mean(), "b": 2 * self.mean()})
            self.log("least", torch.cat(self.seen).min(), reduce_fx="min")
            self.log("falling", -self.mean() * (self.current_epoch + 1))
            self.log("ids", self.ids)
            self.log("computed", self.ids.compute())  # on the last stage alone
        self.log("on_all_stages", 2 * self.ids.compute())
        self.log("epoch", float(self.current_epoch), reduce_fx="sum")

    def on_train_epoch_end(self) -> None:
        self.shown.append({n: float(v) for n, v in self.trainer.callback_metrics.items() if "loss" not in n})
        if self.seen:
            self.log("whole_epoch", self.mean() + self.current_epoch)


class Vanilla(Collects, VanillaGPT):
    pass


class Ours(Collects, OurGPT):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return [optimizer], [{"scheduler": scheduler, "monitor": "guarded"}]


class LogsToo(Callback):
    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        if module.seen:
            module.log("callbacks", 2 * module.mean())


def _fitted(layouts: list[Layout | None], folder: str) -> list[dict[str, Any]]:
    return [_fit(layout, f"{folder}/{layout}") for layout in layouts]


def _fit(layout: Layout | None, folder: str) -> dict[str, Any]:
    dp = layout.dp if layout else 1
    module: Any = Ours(CONFIG) if layout else Vanilla()
    best = ModelCheckpoint(f"{folder}/best", monitor="whole_epoch", save_top_k=1)
    stops = EarlyStopping("falling", mode="max", patience=0, strict=layout is None or layout.pp == 1)
    run = trainer_of(
        layout,
        folder,
        max_epochs=4,
        max_steps=-1,
        limit_val_batches=1.0,
        log_every_n_steps=1,
        callbacks=[LogsToo(), best, stops],
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=True,
    )
    rows = Rows(text_samples(CONFIG, ROWS))
    rank = run.strategy.data_parallel_rank if layout else 0  # type: ignore[attr-defined]
    sampler = DistributedSampler(rows, dp, rank, shuffle=False) if layout else SequentialSampler(rows)
    run.fit(module, DataLoader(rows, batch_size=4 // dp, sampler=sampler), DataLoader(rows, batch_size=4 // dp))
    run.strategy.barrier()
    with Path(f"{folder}/metrics.csv").open() as file:
        written = [{n: float(v) for n, v in row.items() if v and "loss" not in n} for row in csv.DictReader(file)]
    assert "profile" not in vars(run.profiler)
    assert "log" not in vars(module)
    rate = run.optimizers[0].param_groups[0]["lr"] if layout else None
    return {"shown": module.shown, "csv": written, "epochs": run.current_epoch, "rate": rate,
            "best": float(best.best_model_score)}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Any:
    folder = str(tmp_path_factory.mktemp("hooks"))
    [[expected]] = run_ranks(1, _fitted, [None], folder)
    return expected, run_ranks(2, _fitted, [Layout(pp=2), Layout(dp=2), Layout(pp=2, vp=2)], folder)


def test_hooks_log_what_the_stages_and_replicas_that_know_it_log(runs):
    expected, ranks = runs
    assert expected["shown"][0]["from_rank_0"] == 3.0
    for rank in ranks:
        for seen in rank:  # sums of another order
            assert seen["epochs"] == expected["epochs"]
            assert seen["rate"] == 0.5, "ReduceLROnPlateau follows a value of the last stage"
            assert seen["best"] == pytest.approx(expected["best"], rel=1e-5)
            for kind in ("shown", "csv"):
                assert len(seen[kind]) == len(expected[kind])
                for mine, reference in zip(seen[kind], expected[kind], strict=True):
                    assert mine == pytest.approx(reference, rel=1e-5)
