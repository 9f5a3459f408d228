"""A plain module under ``MegatronStrategy`` behaves as under Lightning alone: hooks, counts, modes, names, resuming."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import StrategyRegistry
from torch.utils.data import DistributedSampler, SequentialSampler

from lightning_megatron import MegatronStrategy
from tests.support.layout import Layout
from tests.support.plain_module import CountingModule, plain_data
from tests.support.ranks import run_ranks
from tests.support.trainer import QUIET, trainer

OURS, THEIRS = "megatron", "vanilla"


class Recorder(pl.Callback):
    """The names of a callback's hooks, in the order in which they are called."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("on_") and callable(found):
            object.__getattribute__(self, "calls").append(name)
        return found


def _make(kind, **options):
    options["use_distributed_sampler"] = False  # Lightning's own shuffles, and one vanilla process has none
    if kind == OURS:
        return trainer(Layout(), **options)
    return Trainer(accelerator="cpu", devices=1, **{**QUIET, **options})


def _hooks(kind):
    recorder, module = Recorder(), CountingModule()
    run = _make(kind, max_epochs=2, callbacks=[recorder], accumulate_grad_batches=3, val_check_interval=0.5)
    run.fit(module, plain_data(), plain_data(8))
    loss = float(run.callback_metrics["inside"])
    run.validate(module, plain_data(8), verbose=False)
    return {
        "calls": recorder.calls,
        "steps": run.global_step,  # windows of 3, 3 and 1 batches
        "backwards": module.backwards,
        "modes": module.modes,
        "progress": run.fit_loop.state_dict()["epoch_loop.batch_progress"],
        "optimized": run.fit_loop.state_dict()["epoch_loop.automatic_optimization.optim_progress"],
        "loss": loss,
    }


def _on_exception(kind):
    run = _make(kind, max_epochs=2)
    with pytest.raises(RuntimeError, match="stop here"):
        run.fit(CountingModule(raise_at=9), plain_data())
    state = run.fit_loop.state_dict()
    # The one difference: gradients are zeroed before the step that raises (see loops.py), in Lightning after it.
    state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].pop("zero_grad")
    return {"steps": run.global_step, "state": {k: v for k, v in state.items() if k.endswith("progress")}}


def _names(kind):
    monitor = LearningRateMonitor()
    _make(kind, max_epochs=1, callbacks=[monitor], logger=DummyLogger(), log_every_n_steps=1).fit(
        CountingModule(), plain_data()
    )
    return monitor.lrs


def _early_stopping(kind):
    stopping = EarlyStopping("unseen", patience=0, mode="max")  # the loss falls, so it stops after two
    run = _make(kind, max_epochs=9, callbacks=[stopping], num_sanity_val_steps=0)
    run.fit(CountingModule(), plain_data(), plain_data(8))
    return {"epoch": run.current_epoch, "stopped": stopping.stopped_epoch, "waited": stopping.wait_count}


def _resumed(kind, folder):
    whole = _make(kind, max_epochs=3)
    module = CountingModule()
    whole.fit(module, plain_data())
    first = _make(kind, max_epochs=1)
    first.fit(CountingModule(), plain_data())
    first.save_checkpoint(f"{folder}/{kind}.ckpt")
    second, resumed = _make(kind, max_epochs=3), CountingModule()
    second.fit(resumed, plain_data(), ckpt_path=f"{folder}/{kind}.ckpt", weights_only=False)
    pairs = zip(module.parameters(), resumed.parameters(), strict=True)
    return {"steps": second.global_step, "equal": all(torch.equal(a, b) for a, b in pairs)}


@pytest.mark.parametrize("behaviour", [_hooks, _on_exception, _names, _early_stopping], ids=lambda f: f.__name__[1:])
def test_as_under_lightning_alone(behaviour):
    ours, theirs = (run_ranks(1, behaviour, kind)[0] for kind in (OURS, THEIRS))
    assert ours.keys() == theirs.keys() if isinstance(ours, dict) else True
    loss = (ours.pop("loss", 0.0), theirs.pop("loss", 0.0))
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)
    assert ours == theirs


def test_a_resumed_run_is_the_whole_run(tmp_path):
    for kind in (OURS, THEIRS):
        assert run_ranks(1, _resumed, kind, str(tmp_path))[0] == {"steps": 21, "equal": True}


def _stops_and_goes_on(kind, folder):
    """A run that stopped early goes on from its checkpoint when it is given more patience."""
    path = f"{folder}/{kind}.ckpt"

    def fit(patience, ckpt_path=None):
        stopping = EarlyStopping("unseen", patience=patience, mode="max")  # the loss falls: every epoch waits
        run = _make(kind, max_epochs=9, callbacks=[stopping], num_sanity_val_steps=0)
        run.fit(
            CountingModule(),
            plain_data(),
            plain_data(8),
            ckpt_path=ckpt_path,
            weights_only=False if ckpt_path else None,
        )
        return run, {"epoch": run.current_epoch, "step": run.global_step, "waited": stopping.wait_count}

    first, seen = fit(2)
    first.save_checkpoint(path)
    return {"first": seen, "then": fit(4, path)[1]}


def test_an_early_stop_goes_on_with_more_patience(tmp_path):
    ours, theirs = (run_ranks(1, _stops_and_goes_on, kind, str(tmp_path))[0] for kind in (OURS, THEIRS))
    assert ours == theirs
    assert ours["then"]["epoch"] > ours["first"]["epoch"]


class Grown(CountingModule):
    """Has a layer that older checkpoints do not have."""

    def __init__(self, strict):
        super().__init__()
        self.added = torch.nn.Linear(2, 2)
        if strict is not None:
            self.strict_loading = strict


def _strictness(kind, folder):
    path, seen = f"{folder}/{kind}.ckpt", {}
    run, module = _make(kind, max_epochs=1), CountingModule()
    run.fit(module, plain_data())
    run.save_checkpoint(path)
    for strict in (None, True, False):
        grown = Grown(strict)
        try:
            _make(kind).validate(grown, plain_data(8), ckpt_path=path, weights_only=False, verbose=False)
        except Exception as error:
            seen[strict] = "refused" if "added" in str(error) else str(error)
        else:
            seen[strict] = "loaded" if torch.equal(grown.layers[0].weight, module.layers[0].weight) else "lost"
    return seen


def test_strict_loading(tmp_path):
    ours, theirs = (run_ranks(1, _strictness, kind, str(tmp_path))[0] for kind in (OURS, THEIRS))
    assert ours == theirs == {None: "refused", True: "refused", False: "loaded"}


class Named(MegatronStrategy):
    """A subclass with a name of its own."""

    def __init__(self, on_nonfinite="ignore", **options):
        super().__init__(on_nonfinite=on_nonfinite, **options)


def _registered():
    StrategyRegistry.register("mine", Named, description="a test's")
    run = Trainer(accelerator="cpu", devices=2, strategy="mine", max_steps=1, **QUIET)
    run.fit(CountingModule(), plain_data())
    return type(run.strategy).__name__, run.strategy.on_nonfinite, run.global_step


def test_a_subclass_under_a_name_of_its_own():
    assert run_ranks(2, _registered) == [("Named", "ignore", 1)] * 2


def _samplers(replace):
    run = trainer(Layout(dp=2), {}, max_steps=1, use_distributed_sampler=replace)
    run.fit(CountingModule(), plain_data())
    return type(run.train_dataloader.sampler)


@pytest.mark.parametrize(("replace", "kind"), [(True, DistributedSampler), (False, SequentialSampler)])
def test_the_sampler_is_replaced_over_replicas_unless_forbidden(replace, kind):
    assert run_ranks(2, _samplers, replace) == [kind, kind]
