"""Schedulers under the strategy set the rates that vanilla Lightning sets, step by step."""

from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import DummyLogger
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    ExponentialLR,
    LinearLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from lightning_megatron import LRSchedule
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.pages import blocks
from tests.support.ranks import run_in_pool, run_ranks
from tests.support.scheduled_gpt import CONFIG, EPOCHS, Scheduled, adam, loaders
from tests.support.trainer import QUIET, trainer

RUN: dict[str, Any] = {"max_epochs": EPOCHS, "accumulate_grad_batches": 2}
GROWING: dict[str, Any] = {
    "weight_decay_style": "cosine", "start_weight_decay": 0.01, "end_weight_decay": 0.2
}  # fmt: skip


KINDS: dict[str, Any] = {
    "megatron": LRSchedule("cosine", warmup_fraction=0.25, min_lr=1e-4, **GROWING),
    "megatron in samples": LRSchedule("WSD", warmup_steps=40, wsd_decay_steps=64, unit="samples"),
    "per epoch": lambda optimizer: {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch"},
    "every second step": lambda optimizer: {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step", "frequency": 2},
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, threshold=0.028, factor=0.5),
    "chained": lambda optimizer: ChainedScheduler([ConstantLR(optimizer, 0.1, 3), ExponentialLR(optimizer, 0.9)]),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=3), ExponentialLR(optimizer, 0.8)], [3]
    ),
    "transformers": partial(get_cosine_schedule_with_warmup, num_warmup_steps=2, num_training_steps=12),
}


class Rates(Callback):
    """Learning rate and weight decay at the start of each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.seen.append((group["lr"], group["weight_decay"]))


class PlainGPT(pl.LightningModule):
    """The same model without Megatron."""

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        initial = plain_gpt.initial_weights(CONFIG)
        self.names, self.weights = list(initial), torch.nn.ParameterList(initial.values())
        self.schedule = schedule

    def training_step(self, batch, batch_idx):
        weights = dict(zip(self.names, self.weights, strict=True))
        each = plain_gpt.logits(CONFIG, weights, batch["tokens"]).transpose(1, 2)
        each = F.cross_entropy(each, batch["labels"], reduction="none")
        return (each * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=int(batch["loss_mask"].sum()))

    def configure_optimizers(self):
        optimizer = adam(self.parameters())
        if isinstance(self.schedule, LRSchedule):
            made = self.schedule.build(optimizer, self.trainer)
        else:
            made = self.schedule(optimizer)
        if isinstance(made, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": made, "monitor": "val_loss"}
        return {
            "optimizer": optimizer,
            "lr_scheduler": made if isinstance(made, dict) else {"scheduler": made, "interval": "step"},
        }


def _rates(layout: Layout | None) -> dict[str, Any]:
    """Of every kind: the rates of each batch, and what LearningRateMonitor noted."""
    found = {}
    for kind, schedule in KINDS.items():
        rates, monitor = Rates(), LearningRateMonitor()
        options = {**RUN, "callbacks": [rates, monitor], "logger": DummyLogger(), "log_every_n_steps": 1}
        if layout is None:
            run = Trainer(accelerator="cpu", devices=1, **{**QUIET, **options})
            run.fit(PlainGPT(schedule), *loaders(1, 0))
        else:
            run = trainer(layout, **options)
            module = Scheduled(CONFIG, optimizer=adam, lr_schedule=schedule)
            run.fit(module, *loaders(layout.dp, run.strategy.data_parallel_rank))
        found[kind] = {"rates": rates.seen, "monitor": monitor.lrs, "steps": run.global_step}
    return found


@cache
def vanilla() -> dict[str, Any]:
    return run_in_pool(1, _rates, None)[0]


def test_the_schedules_move():
    for kind, seen in vanilla().items():
        assert len({lr for lr, _ in seen["rates"]}) > 1, kind
        assert seen["steps"] == 3 * EPOCHS
    assert 1 < len(set(vanilla()["plateau"]["rates"])) < EPOCHS, "it reduces at every epoch"


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(tp=2, dp=2)], ids=str)
def test_rates_are_vanillas(layout):
    for rank in run_in_pool(layout.world_size, _rates, layout):
        assert rank == vanilla()


def _skipped(scale: float) -> dict[str, Any]:
    module = Scheduled(CONFIG, optimizer=adam, lr_schedule=LRSchedule("linear", warmup_steps=1))
    rates = Rates()
    run = trainer(Layout(pp=2), None, "16-mixed", scale, max_steps=3, callbacks=[rates])
    run.fit(module, DataLoader(Rows(text_samples(CONFIG, 200)), batch_size=4))
    scheduler = run.lr_scheduler_configs[0].scheduler
    return {
        "skipped": run.strategy.optimizers[0].skipped_steps,
        "steps": (scheduler.num_steps, run.global_step),
        "rates": [lr for lr, _ in rates.seen],
    }


def test_a_skipped_fp16_step_counts_in_no_schedule():
    for seen in run_in_pool(2, _skipped, 2.0**40):
        lr = plain_gpt.ADAM["lr"]
        assert seen["skipped"] > 0
        assert seen["steps"] == (3, 3)
        assert seen["rates"] == pytest.approx([0.0] * (seen["skipped"] + 1) + [lr, lr / 2])


def _resumed(folder: str) -> dict[str, Any]:
    layout = Layout(pp=2)
    growing = LRSchedule("cosine", warmup_steps=2, decay_steps=12, **GROWING)

    def fit(epochs: int, path: str | None = None) -> tuple[Trainer, Any, list]:
        module, rates = Scheduled(CONFIG, optimizer=adam, lr_schedule=growing), Rates()
        run = trainer(layout, max_epochs=epochs, callbacks=[rates])
        run.fit(module, loaders(1, 0)[0], ckpt_path=path, weights_only=False)
        return run, [p.detach() for p in module.parameters()], rates.seen

    _, whole, expected = fit(2)
    first, _, found = fit(1)
    first.save_checkpoint(f"{folder}/epoch.ckpt")
    _, resumed, rest = fit(2, f"{folder}/epoch.ckpt")
    equal = all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    return {"equal": equal, "rates": found + rest == expected}


def test_resumed_rates_and_weights_are_exact(tmp_path):
    assert run_in_pool(2, _resumed, str(tmp_path)) == [{"equal": True, "rates": True}] * 2


def _page(blocks: list[str]) -> tuple[list[float], list[dict[str, Any]]]:
    """The rates of the page's module, and the groups of its layer-wise one."""
    names: dict[str, Any] = {}
    for code in blocks:
        exec(code, names)
    rates, run = Rates(), trainer(Layout(), max_steps=1)
    trainer(Layout(), max_steps=5, callbacks=[rates]).fit(names["module"], loaders(1, 0)[0])
    run.fit(names["LayerWise"](names["module"].config), loaders(1, 0)[0])
    return [lr for lr, _ in rates.seen], run.optimizers[0].state_dict()["groups"]


def test_the_example_of_the_docs_runs():
    ((rates, groups),) = run_ranks(1, _page, blocks("schedules.md"))
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(1e-3, 0.0), (1e-3, 0.1), (8e-4, 0.1)}
    assert rates[:3] == pytest.approx([0.0, 1.5e-3, 3e-3])
    assert rates[3] > rates[4] > 1e-4
