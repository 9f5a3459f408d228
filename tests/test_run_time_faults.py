"""What a run does when it is told to end, and when a loss or a gradient is no number."""

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_megatron.checkpoint import manifest
from tests.parallel_gpt import Layout, LoadedGPT, Rows, Watch, text_samples
from tests.ranks import RankError, run_ranks
from tests.test_checkpoints import SMALL
from tests.test_training import trainer


def fit(layout, steps, callbacks, load=None, strategy=None, module=None, accumulate=1):
    run = trainer(
        layout, strategy, max_steps=steps, max_epochs=-1, callbacks=callbacks, accumulate_grad_batches=accumulate,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )  # fmt: skip
    run.fit(module or LoadedGPT(SMALL), DataLoader(Rows(text_samples(SMALL, 48)), batch_size=4), ckpt_path=load)
    return run


class Signal(Callback):
    """Tells one rank to end, in the middle of a batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 3 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _preempted(folder, accumulate, asynchronous):
    whole = Watch()
    fit(Layout(pp=2, dp=2), 8, [whole], accumulate=accumulate)
    callbacks = [Signal(), ModelCheckpoint(folder, save_top_k=0)]
    with pytest.raises(SystemExit) as stop:
        fit(Layout(pp=2, dp=2), 8, callbacks, accumulate=accumulate, strategy={"async_save": asynchronous})
    watch = Watch()
    run = fit(Layout(pp=2, dp=2), 8, [watch, ModelCheckpoint(folder, save_top_k=0)], "last", accumulate=accumulate)
    assert watch.losses == whole.losses[-len(watch.losses) :]
    return stop.value.code, run.global_step, len(watch.losses)


@pytest.mark.parametrize(("accumulate", "asynchronous"), [(1, False), (1, True), (3, False)])
def test_sigterm_saves_stops_and_resumes(tmp_path, accumulate, asynchronous):
    for code, step, batches in run_ranks(4, _preempted, str(tmp_path), accumulate, asynchronous):
        assert (code, step) == (143, 8)
        assert batches == {1: 4, 3: 18}[accumulate]
    assert manifest.read(tmp_path / "last.ckpt")["global_step"] == {1: 4, 3: 2}[accumulate]


class Bad(LoadedGPT):
    """Its loss, or only its gradient, is no number at the third batch."""

    what = "loss"

    def on_train_batch_start(self, batch, batch_idx):
        self.now = batch_idx == 2

    def loss(self, output, batch):
        total, tokens = super().loss(output, batch)
        if self.now and self.what == "loss":
            total = total * float("nan")
        elif self.now:
            total = total + 0 * torch.sqrt(total * 0)  # the derivative of the root at 0 is infinite
        return total, tokens


def _bad(what, on_nonfinite):
    module, watch = Bad(SMALL), Watch()
    module.what = what
    run = fit(Layout(tp=2), 4, [watch], strategy={"on_nonfinite": on_nonfinite}, module=module)
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    return run.global_step, len(watch.losses), float(run.callback_metrics["skipped_steps"]), finite


@pytest.mark.parametrize(
    ("what", "message"), [("loss", "loss of step 2 is nan"), ("gradient", "gradients' norm is nan")]
)
def test_a_loss_or_gradient_that_is_no_number_ends_the_run_or_the_step(what, message):
    with pytest.raises(RankError, match=message):
        run_ranks(2, _bad, what, "raise")
    assert run_ranks(2, _bad, what, "skip") == [(4, 5, 1.0, True)] * 2


class Position(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        metrics = trainer.callback_metrics
        self.seen.append((int(metrics["data_epoch"]), int(metrics["data_batch"]), batch["tokens"].sum().item()))


def _rewound(folder):
    whole, part = Position(), Position()
    told = {"log_data_position": True}
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(Layout(), 10, [whole, keep], strategy=told)
    fit(Layout(), 7, [part], f"{folder}/step=4.ckpt", strategy={**told, "skip_batches": 3})
    assert [epoch for epoch, _, _ in whole.seen] == [0] * 10
    assert [batch for _, batch, _ in whole.seen] == list(range(10))
    assert part.seen == whole.seen[7:]


def test_a_run_is_rewound_and_a_spike_left_out(tmp_path):
    run_ranks(1, _rewound, str(tmp_path))


class Sleeper(Callback):
    """One rank does not come back, or stops altogether."""

    def __init__(self, how):
        self.how = how

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == 1:
            if self.how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(40)


def _hang(how):
    strategy = {"timeout": timedelta(seconds=4)}
    with pytest.raises(Exception, match="imed out|imeout|closed by peer|reset by peer") as error:
        fit(Layout(pp=2), 6, [Sleeper(how)], strategy=strategy)
    return "\n".join(getattr(error.value, "__notes__", []))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("asleep", r"rank 1 .pipeline stage 1, .* is in no collective; it is in on_train_batch_start .*faults.py"),
        ("stopped", r"rank 1 .pipeline stage 1, .* is not heard of any more"),
    ],
)
def test_a_time_out_names_the_rank_that_was_waited_for(how, told):
    with pytest.raises(RankError) as error:  # the rank that hangs gives no result
        run_ranks(2, _told, how, timeout=25)
    assert re.search(told, str(error.value)), str(error.value)[-3000:]
    assert "This rank waited in" in str(error.value)


def _told(how):
    raise AssertionError(_hang(how))
