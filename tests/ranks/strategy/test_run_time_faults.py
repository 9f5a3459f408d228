"""What a run does when it is told to end, and when a loss or a gradient is no number."""

import os
import re
import signal
import subprocess
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch.utils.data import DataLoader

from lightning_megatron import Checkpointing
from lightning_megatron.callbacks import TrainingMonitor
from lightning_megatron.checkpoint import manifest, shard_files
from tests.reference.parallel_gpt import LoadedGPT, Rows, Watch, text_samples
from tests.support.layout import Layout
from tests.support.pages import ROOT
from tests.support.preloaded_python import executable
from tests.support.ranks import RankError, run_ranks
from tests.support.small_gpt import SMALL
from tests.support.trainer import trainer


def fit(layout, steps, callbacks, load=None, strategy=None, module=None, accumulate=1, **options):
    run = trainer(
        layout, strategy, max_steps=steps, max_epochs=-1, callbacks=callbacks, accumulate_grad_batches=accumulate,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks), **options,
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
        fit(
            Layout(pp=2, dp=2),
            8,
            callbacks,
            accumulate=accumulate,
            strategy={"checkpointing": Checkpointing(async_save=asynchronous)},
        )
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


def _preempted_without_a_place():
    with pytest.warns(UserWarning, match="A signal ends the run, and nothing is saved: there is no ModelCheckpoint"):  # noqa: SIM117
        with pytest.raises(SystemExit):
            fit(Layout(), 8, [Signal()])


def test_sigterm_without_a_place_to_save_to_says_so():
    run_ranks(1, _preempted_without_a_place)


class Requeued(Signal):
    """SLURM's signal before the end of a job's time, which comes to one rank only."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def _under_slurm(folder, asynchronous, resumed):
    rank = os.environ["RANK"]
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        del os.environ[name]
    os.environ.update(SLURM_NTASKS="2", SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NODEID="0")
    os.environ.update(SLURM_JOB_ID="4711", SLURM_JOB_NAME="train", SLURM_NTASKS_PER_NODE="2")
    os.environ["PATH"] = f"{folder}/bin:{os.environ['PATH']}"
    watch = Watch()
    run = trainer(
        Layout(tp=2), {"checkpointing": Checkpointing(async_save=asynchronous)}, max_steps=8, max_epochs=-1,
        default_root_dir=folder, callbacks=[watch] if resumed else [watch, Requeued()],
    )  # fmt: skip
    data = DataLoader(Rows(text_samples(SMALL, 48)), batch_size=4, shuffle=True)
    stop = None
    try:
        run.fit(LoadedGPT(SMALL), data)
    except SystemExit as error:
        stop = error.code
    return type(run.strategy.cluster_environment).__name__, stop, run.global_step, watch.losses


def _uninterrupted():
    watch = Watch()
    run = trainer(Layout(tp=2), max_steps=8, max_epochs=-1, callbacks=[watch])
    run.fit(LoadedGPT(SMALL), DataLoader(Rows(text_samples(SMALL, 48)), batch_size=4, shuffle=True))
    return watch.losses


@pytest.mark.parametrize("asynchronous", [False, True])
def test_slurm_requeues_a_job_once_its_checkpoint_is_whole(tmp_path, asynchronous):
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked; ls {tmp_path}/hpc_ckpt_1.ckpt >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    first = run_ranks(2, _under_slurm, str(tmp_path), asynchronous, False)
    assert (tmp_path / "asked").read_text().split()[:3] == ["requeue", "4711", "manifest.json"]
    second = run_ranks(2, _under_slurm, str(tmp_path), asynchronous, True)
    whole = run_ranks(2, _uninterrupted)[0]
    for before, after in zip(first, second, strict=True):
        assert before[:3] == ("SLURMEnvironment", 143, 4)
        assert after[:3] == ("SLURMEnvironment", None, 8)
        assert before[3] + after[3] == whole


class TimeIsUp(Callback):
    """The clock of one rank is ahead."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 3 and trainer.global_rank == 0:
            timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))
            timer._offset = 3600  # private (Lightning 2.6): seconds of the runs before


def _max_time(folder):
    whole, watch, after = Watch(), Watch(), Watch()
    fit(Layout(tp=2), 8, [whole])
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    stopped = fit(Layout(tp=2), 8, [watch, TimeIsUp(), keep], max_time={"hours": 1})
    fit(Layout(tp=2), 8, [after, ModelCheckpoint(folder)], load="last")
    return stopped.global_step, watch.losses + after.losses == whole.losses


@pytest.mark.alone
def test_max_time_stops_all_ranks_at_one_step_and_the_run_resumes(tmp_path):
    assert run_ranks(2, _max_time, str(tmp_path)) == [(4, True)] * 2


def _restarts(folder, *options):
    command = [executable(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    run = subprocess.run(
        [*command, "-m", "tests.support.scripts.restarted_script", folder],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / "end.pt")


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_torchrun_restarts_after_a_kill_and_ends_with_the_same_weights(tmp_path, asynchronous):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ("kill-async" if asynchronous else "kill")).touch()
    whole = _restarts(tmp_path / "whole")
    killed = _restarts(tmp_path / "killed", "--max-restarts=1")
    assert (whole["from"], killed["from"]) == (0, 4)
    for name, value in whole["weights"].items():
        assert torch.equal(killed["weights"][name], value), name


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


@pytest.mark.parametrize(("what", "message"), [("loss", "loss of step 2 is nan"), ("gradient", "gradient norm is nan")])
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
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    each_step = {"log_every_n_steps": 1}
    fit(Layout(), 10, [TrainingMonitor(), whole, keep], **each_step)
    skip = {"checkpointing": Checkpointing(skip_batches=3)}
    fit(Layout(), 7, [TrainingMonitor(), part], f"{folder}/step=4.ckpt", strategy=skip, **each_step)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("asleep", r"rank 1 .pipeline stage 1, .* is in no collective; it is in on_train_batch_start .*faults.py"),
        ("stopped", r"rank 1 .pipeline stage 1, .* no longer reports"),
    ],
)
def test_a_time_out_names_the_rank_that_was_waited_for(how, told):
    with pytest.raises(RankError) as error:  # the rank that hangs gives no result
        run_ranks(2, _told, how, timeout=25, seconds_for_others=3)
    assert re.search(told, str(error.value)), str(error.value)[-3000:]
    assert "This rank waited in" in str(error.value)


def _told(how):
    raise AssertionError(_hang(how))


def _stops_while_it_saves(folder):
    """Rank 1 stops beside training; rank 0's training times out, and then its save has to."""

    def stop(*args):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return write(*args)

    write, shard_files.write = shard_files.write, stop
    strategy = {"timeout": timedelta(seconds=4), "checkpointing": Checkpointing(async_save=True)}
    fit(Layout(pp=2), 6, [ModelCheckpoint(folder, every_n_train_steps=1)], strategy=strategy)


@pytest.mark.slow
def test_a_save_waits_no_longer_than_the_timeout(tmp_path):
    with pytest.raises(RankError, match="imed out|imeout") as error:  # the rank that stops gives no result
        run_ranks(2, _stops_while_it_saves, str(tmp_path), timeout=80, seconds_for_others=3)
    assert "rank 0: Traceback" in str(error.value)
    assert not list(tmp_path.glob("*.ckpt"))


def _interrupted(folder, both):
    """Ctrl-C while a save goes on."""
    write, shard_files.write = shard_files.write, lambda *args: (time.sleep(1), write(*args))[1]

    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2 and (both or trainer.global_rank == 0):
                os.kill(os.getpid(), signal.SIGINT)

    keep = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    strategy = {"timeout": timedelta(seconds=20), "checkpointing": Checkpointing(async_save=True)}
    try:
        fit(Layout(pp=2), 8, [Interrupt(), keep], strategy=strategy)
    except SystemExit as stop:
        return stop.code
    except Exception as error:
        return type(error).__name__
    return None


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("both", [True, False])
def test_an_interrupt_lets_a_save_end(tmp_path, both):
    results = run_ranks(2, _interrupted, str(tmp_path), both, timeout=60)
    assert results[0] == 1
    about = manifest.read(tmp_path / "step=2.ckpt")
    assert not manifest.find_damage(tmp_path / "step=2.ckpt", about, list(about["files"]), checksums=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]
