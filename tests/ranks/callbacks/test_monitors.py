"""What the monitoring callbacks log: the truth's norms, exact counts, the operations torch counts, who was slow."""

import csv
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_megatron.callbacks import MemoryMonitor, PhaseTimes, PipelineTimeline, Throughput, TrainingMonitor
from lightning_megatron.models.flops import training_flops
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import loader, trainer

CONFIG = replace(plain_gpt.GPT2, num_layers=4)
LAYOUTS = [
    Layout(tp=2, sp=True, pp=2),
    Layout(dp=2, pp=2),
    Layout(dp=4),
    Layout(tp=2, dp=2, sharded=False),
    Layout(cp=2, dp=2),
]


def fit(layout: Layout, callbacks: list[Callback], folder: str = "", rows: int = 8, steps: int = 3, **options: Any):
    logger = CSVLogger(folder, name="", version="") if folder else False
    settings = {"max_steps": steps, "log_every_n_steps": 1, "gradient_clip_val": 0.5, **options}
    run = trainer(layout, callbacks=callbacks, logger=logger, **settings)
    accumulate = options.get("accumulate_grad_batches", 1)
    samples = Rows(text_samples(CONFIG, rows * steps * 2))
    module = LoadedGPT(CONFIG)
    run.fit(module, loader(samples, layout, rows // accumulate, run), ckpt_path=options.get("ckpt_path"))
    return run


# Norms


class Norms(Callback):
    """The truth's, of one process: plain torch over all parameters."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, run, module, optimizer):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.gradient = float(torch.cat([g.flatten() for g in gradients]).double().norm())

    def on_train_batch_end(self, run, module, *_):
        weights = torch.cat([p.detach().flatten() for p in module.parameters()]).double().norm()
        self.seen.append((self.gradient, float(weights)))


def _truth(folder: str) -> list:
    norms = Norms()
    fit(Layout(sharded=False), [norms])
    return norms.seen


class Logged(Callback):
    def __init__(self, *names: str):
        self.names, self.seen = names, []

    def on_train_batch_end(self, run, *_):
        self.seen.append(tuple(float(run.logged_metrics[name]) for name in self.names))


NAMES = ("grad_norm", "param_norm")


def _monitored(layout: Layout, folder: str) -> Any:
    logged = Logged(*NAMES)
    fit(layout, [TrainingMonitor(), logged], folder)
    return logged.seen


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_norms_are_the_truths(layout, tmp_path):
    (expected,) = run_in_pool(1, _truth, "")
    seen = run_in_pool(layout.world_size, _monitored, layout, str(tmp_path))
    assert all(each == seen[0] for each in seen)
    for (gradient, weights), (true_gradient, true_weights) in zip(seen[0], expected, strict=True):
        assert gradient == pytest.approx(true_gradient, rel=1e-4)  # sums in another order
        assert weights == pytest.approx(true_weights, rel=1e-6)
    written = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [float(row["param_norm"]) for row in written if row["param_norm"]] == pytest.approx(
        [weights for _, weights in seen[0]], rel=1e-6
    )


def _zeros(layout: Layout) -> tuple[int, float]:
    """Of an embedding of its own, rows of tokens that no sample has get no gradient."""
    config = replace(CONFIG, tie_embeddings=False)
    run = trainer(layout, callbacks=[TrainingMonitor()], max_steps=1, log_every_n_steps=1)
    samples = text_samples(config, 2)
    run.fit(LoadedGPT(config), loader(Rows(samples), layout, 2, run))
    unseen = config.vocab_size - len(samples["tokens"].unique())
    return unseen * config.hidden_size, float(run.logged_metrics["zeros_in_grad"])


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(dp=2), Layout(cp=2)], ids=str)
def test_zeros_are_counted_once(layout):
    for expected, seen in run_in_pool(layout.world_size, _zeros, layout):
        assert expected > 500
        assert seen == pytest.approx(expected, abs=12)  # key biases' gradients are rounding, and sometimes exactly 0


# Counts


class Consumed(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, run, *_):
        metrics = run.logged_metrics
        if "consumed_samples" in metrics and not run.fit_loop._should_accumulate():
            self.seen.append((float(metrics["consumed_samples"]), float(metrics["consumed_tokens"])))


def _counted(layout: Layout, accumulate: int, folder: str) -> Any:
    consumed = Consumed()
    run = fit(layout, [Throughput(), consumed], accumulate_grad_batches=accumulate)
    run.save_checkpoint(f"{folder}/saved.ckpt")
    resumed = Consumed()
    run = trainer(layout, callbacks=[Throughput(), resumed], max_steps=5, log_every_n_steps=1,
                  accumulate_grad_batches=accumulate)  # fmt: skip
    samples = Rows(text_samples(CONFIG, 8 * 6))
    run.fit(LoadedGPT(CONFIG), loader(samples, layout, 8 // accumulate, run), ckpt_path=f"{folder}/saved.ckpt")
    metrics = {name: float(value) for name, value in run.logged_metrics.items()}
    return consumed.seen, resumed.seen, metrics


@pytest.mark.parametrize(("layout", "accumulate"), [(Layout(dp=2), 1), (Layout(cp=2), 2), (Layout(tp=2), 1)], ids=str)
def test_counts_are_exact_and_go_on(layout, accumulate, tmp_path):
    for before, after, metrics in run_in_pool(2, _counted, layout, accumulate, str(tmp_path)):
        assert before == [(8.0 * n, 8.0 * n * CONFIG.seq_length) for n in (1, 2, 3)]
        assert [samples for samples, _ in after if samples > 24] == [32.0, 40.0]
        assert metrics["tokens_per_second"] == pytest.approx(metrics["samples_per_second"] * CONFIG.seq_length)
        assert metrics["tokens_per_second_per_device"] == pytest.approx(metrics["tokens_per_second"] / 2)
        each = training_flops(CONFIG, (CONFIG.seq_length,)) * metrics["samples_per_second"] / 2 / 1e12
        assert metrics["tflops_per_device"] == pytest.approx(each)
        assert 0 < metrics["mfu"] < 1


# Operations


# Phases


class SlowRows(Rows):
    """One rank's data come late."""

    slow = False

    def __getitem__(self, index):
        if self.slow:
            time.sleep(0.02)
        return super().__getitem__(index)


class SlowModule(LoadedGPT):
    """One rank computes slowly."""

    slow = False

    def training_step(self, batch, batch_idx):
        if self.slow:
            time.sleep(0.05)
        return super().training_step(batch, batch_idx)


def _phases(layout: Layout, slow_rank: int, what: str) -> Any:
    phases = PhaseTimes()
    run = trainer(layout, callbacks=[phases], max_steps=4, log_every_n_steps=2)
    samples, module = SlowRows(text_samples(CONFIG, 8 * 4)), SlowModule(CONFIG)
    {"data": samples, "compute": module}[what].slow = run.global_rank == slow_rank
    run.fit(module, loader(samples, layout, 8, run))
    return (
        {name: float(value) for name, value in run.logged_metrics.items()},
        phases.named,
        len(run.strategy._timers.listeners),
    )


@pytest.mark.alone
@pytest.mark.parametrize("what", ["data", "compute"])
def test_the_slow_rank_is_named(what):
    for values, named, listeners in run_in_pool(2, _phases, Layout(dp=2), 1, what):
        assert named == {(what, 1)}
        assert values[f"time/{what}_rank"] == 1
        assert values[f"time/{what}"] > values[f"time/{what}_min"] + 0.04
        assert 0 < values["time/compute"] <= values["time/forward_backward"] <= values["time/step"]
        assert values["time/optimizer"] > 0
        assert values["time/gradient_sync"] > 0
        assert listeners == 0


# Memory


def _memory(layout: Layout, precision: str) -> Any:
    run = trainer(layout, precision=precision, callbacks=[MemoryMonitor()], max_steps=1, log_every_n_steps=1)
    module = LoadedGPT(CONFIG)
    run.fit(module, loader(Rows(text_samples(CONFIG, 8)), layout, 8, run))
    state = run.strategy.optimizers[0].state
    kept = sum(v.numel() * v.element_size() for s in state.values() for v in s.values() if v.dim())
    shards = sum(
        p.numel() * p.element_size() for group in run.strategy.optimizers[0].param_groups for p in group["params"]
    )
    numbers = sum(p.numel() for p in module.parameters())
    (callback,) = [callback for callback in run.callbacks if isinstance(callback, MemoryMonitor)]
    return callback._estimates[run.global_rank], kept, shards, numbers, float(run.logged_metrics["memory_gib"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(dp=2), Layout(dp=2, sharded=False)], ids=str)
def test_the_estimate_is_what_is_held(layout, precision):
    low = precision != "32-true"
    for estimate, kept, shards, numbers, taken in run_in_pool(2, _memory, layout, precision):
        assert estimate.weights == numbers * (2 if low else 4)
        assert numbers * 4 <= estimate.gradients <= numbers * 4 * 1.2  # buffers are padded
        assert estimate.optimizer == kept + (shards if low else 0)
        assert estimate.total / 2**30 < taken < 20


def _kept(recompute: str | None) -> tuple[int, list[str]]:
    monitor, told = MemoryMonitor(), []
    run = trainer(Layout(), {"recompute": recompute}, callbacks=[monitor], max_steps=2, log_every_n_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_megatron.callbacks.memory.rank_zero_info", told.append)
        run.fit(LoadedGPT(CONFIG), loader(Rows(text_samples(CONFIG, 16)), Layout(), 8, run))
    return monitor._activations, told


def test_recomputation_keeps_less():
    (plain, told), (least, _), (full, _) = (run_in_pool(1, _kept, kind)[0] for kind in (None, "selective", "full"))
    assert full < least < 0.75 * plain
    assert told[0].endswith(f"The first step kept {plain / 2**30:.3g} of activations.")


# Cost


def _nothing() -> Any:
    run = fit(Layout(), [])
    return run.strategy.engine.timers is None and run.strategy.engine.config.timers is None


def test_without_callbacks_nothing_is_timed():
    assert run_in_pool(1, _nothing) == [True]


def _plain(folder: str) -> dict[str, float]:
    callbacks = [Throughput(), MemoryMonitor(), PhaseTimes(), TrainingMonitor(), PipelineTimeline(2, folder)]
    run = trainer(Layout(dp=2), callbacks=callbacks, max_epochs=2, log_every_n_steps=1)
    run.fit(BoringModel(), DataLoader(RandomDataset(32, 16), batch_size=2))
    return {name: float(value) for name, value in run.logged_metrics.items()}


def test_a_plain_module_is_watched_too(tmp_path):
    for seen in run_in_pool(2, _plain, str(tmp_path)):
        assert seen["consumed_samples"] == 32
        assert seen["grad_norm"] > 0
        assert seen["memory_estimate_gib"] > 0
        assert seen["time/compute"] > 0
        assert "mfu" not in seen  # nobody knows its operations
    assert (tmp_path / "step-2.json").is_file()
