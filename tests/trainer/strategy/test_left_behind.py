"""What a user holds after a run (Trainer, callbacks, module, loaders) is as Lightning's own strategies leave it.

It works in a plain Trainer, and is copied and pickled.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanMetric

from lightning_megatron import GPTModule, MegatronModule, MegatronStrategy
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.plain_module import PlainModule
from tests.support.ranks import run_ranks


class Measured(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def validation_step(self, batch, batch_idx):
        loss = (self.layers(batch["x"]) - batch["y"]).square().mean()
        self.mean(loss)
        self.log("unseen", self.mean)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def _callbacks(folder: str) -> list[Any]:
    return [
        ModelSummary(),
        RichModelSummary(),
        ModelCheckpoint(folder, monitor="unseen", save_last="link", save_top_k=2, filename="{step}"),
        EarlyStopping("unseen", patience=9),
        LearningRateMonitor(),
        Timer("00:01:00:00"),
    ]


def _data() -> DataLoader:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(5))
    return DataLoader(Rows({"x": x, "y": x[:, :1]}), batch_size=4)


def _plain_after(callbacks: list[Any], logger: Any, module: Any, data: DataLoader) -> dict[str, float]:
    plain = Trainer(accelerator="cpu", devices=1, max_epochs=2, callbacks=[*callbacks], logger=logger)
    plain.fit(module, data, data)
    return {name: float(value) for name, value in plain.callback_metrics.items()}


def _after_pending_saves(folder: str) -> Any:
    torch.manual_seed(1)
    data, logger, callbacks, module = _data(), CSVLogger(folder), _callbacks(f"{folder}/kept"), Measured()
    before = {id(each): set(vars(each)) for each in callbacks}
    ours = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, strategy=MegatronStrategy(), callbacks=[*callbacks], logger=logger
    )
    ours.fit(module, data, data)
    ours.validate(module, data, verbose=False)
    again = pickle.loads(pickle.dumps(ours))  # a Trainer, too, is sent elsewhere with its callbacks
    again.fit_loop.max_epochs = 2
    again.fit(again.lightning_module, data, data)
    assert again.global_step == 2 * ours.global_step
    # Of methods, Lightning itself leaves the module's two.
    added = [
        (type(each).__name__, name)
        for each in callbacks
        for name in set(vars(each)) - before[id(each)]
        if callable(vars(each)[name]) and name not in ("log", "log_dict")
    ]
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for name, value in module.state_dict().items():
        assert torch.equal(copied.state_dict()[name], value)
        assert torch.equal(pickled.state_dict()[name], value)
    sent = pickle.loads(pickle.dumps(callbacks[2:]))
    gpt = GPTModule(plain_gpt.GPT2)
    rows = DataLoader(Rows(text_samples(plain_gpt.GPT2, 4)), batch_size=4)
    Trainer(
        accelerator="cpu", devices=1, max_steps=1, strategy=MegatronStrategy(), callbacks=callbacks[:2], logger=False,
        enable_checkpointing=False,
    ).fit(gpt, rows)  # fmt: skip
    added += [("after a GPT", name) for each in callbacks[:2] for name in vars(each) if name == "_summary"]
    found = _plain_after([*callbacks[:2], *sent], logger, copied, data)
    assert _plain_after(_callbacks(f"{folder}/other"), logger, pickled, data) == found
    return added, found


def test_callbacks_loggers_and_modules_are_a_plain_trainers_afterwards(tmp_path):
    ((added, found),) = run_ranks(1, _after_pending_saves, str(tmp_path))
    assert added == []
    assert {"inside", "unseen"} <= set(found)


def test_a_summary_that_a_server_has_sent_back(tmp_path):
    """Behind a fit whose ranks a server started: the callback has gone to a rank, and come back."""
    summary, rows = ModelSummary(), DataLoader(Rows(text_samples(plain_gpt.GPT2, 4)), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    strategy = MegatronStrategy(launch="forkserver")
    ours = Trainer(accelerator="cpu", devices=1, max_steps=1, strategy=strategy, callbacks=[summary], **quiet)
    ours.fit(GPTModule(plain_gpt.GPT2), rows)
    plain = Trainer(accelerator="cpu", devices=1, max_steps=1, callbacks=[summary], **quiet)
    plain.fit(Measured(), _data())
    assert plain.global_step == 1


STAGES = ("fit", "stopped", "validate", "test", "predict")


class Stop(Callback):
    """Ends a fit with an error, in the middle of an epoch, where ``now`` is set."""

    now = False

    def on_train_batch_end(self, *_: Any) -> None:
        if self.now:
            raise KeyError("in the middle")


class Whole(Measured):
    test_step = Measured.validation_step

    def predict_step(self, batch, batch_idx):
        return self.layers(batch["x"])


class MeasuredGPT(GPTModule):
    def __init__(self) -> None:
        super().__init__(plain_gpt.GPT2)
        self.mean = MeanMetric()

    def on_validation_epoch_end(self) -> None:
        self.log("unseen", 1.0)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def _owners(run: Trainer, module: Any, loader: DataLoader) -> dict[str, Any]:
    loop = run.fit_loop
    owners = {
        "trainer": run, "fit": loop, "epoch": loop.epoch_loop, "automatic": loop.epoch_loop.automatic_optimization,
        "manual": loop.epoch_loop.manual_optimization, "val": loop.epoch_loop.val_loop,
        "validate": run.validate_loop, "test": run.test_loop, "predict": run.predict_loop,
        "data": run._data_connector, "signals": run._signal_connector, "logs": run._logger_connector,
        "profiler": run.profiler, "logger": run.logger, "metric": module.mean,
        "loader": loader, "sampler": loader.sampler, "batch_sampler": loader.batch_sampler,
    }  # fmt: skip
    return owners | {type(each).__name__: each for each in run.callbacks}


def _changed(strategy: Any, module: Any, samples: Any, folder: str) -> dict[str, Any]:
    """By stage, the attributes that the stage leaves with another value, and the type of that."""
    loader = DataLoader(samples, batch_size=2, sampler=DistributedSampler(samples, 2, 0), num_workers=0)
    callbacks = [ModelSummary(), ModelCheckpoint(folder, save_last="link"), Stop()]
    run = Trainer(
        accelerator="cpu", devices=2, max_epochs=1, strategy=strategy, callbacks=callbacks, logger=CSVLogger(folder),
        num_sanity_val_steps=0, enable_progress_bar=False, use_distributed_sampler=False,
    )  # fmt: skip
    found, states = {}, module.mean._defaults
    for stage in STAGES:
        before = {name: dict(vars(owner)) for name, owner in _owners(run, module, loader).items()}
        if stage == "stopped":
            Stop.now, run.fit_loop.max_epochs = True, 2
            with pytest.raises(KeyError):
                run.fit(module, loader, loader)
            Stop.now = False
        elif stage == "fit":
            run.fit(module, loader, loader)
        else:
            getattr(run, stage)(module, loader)
        after = {name: dict(vars(owner)) for name, owner in _owners(run, module, loader).items()}
        assert before.keys() == after.keys()
        found[stage] = {
            (owner, name): type(values.get(name)).__name__
            for owner, values in after.items()
            for name in values.keys() | before[owner].keys()
            if values.get(name) is not before[owner].get(name) and not (owner == "metric" and name in states)
        }
        patched = [
            (owner, name, str(value))
            for owner, values in after.items()
            for name, value in values.items()
            if "lightning_megatron" in str(getattr(getattr(value, "func", value), "__module__", ""))
            and not isinstance(value, MegatronModule | MegatronStrategy)
        ]
        assert patched == []
    return found


def _all_stages(folder: str) -> Any:
    torch.manual_seed(1)
    rows, texts = _data().dataset, Rows(text_samples(plain_gpt.GPT2, 8))
    lightnings = _changed("ddp", Whole(), rows, f"{folder}/lightning")
    plain = _changed(MegatronStrategy(), Whole(), rows, f"{folder}/plain")
    gpt = _changed(MegatronStrategy(pp=2), MeasuredGPT(), texts, f"{folder}/gpt")
    return lightnings, plain, gpt


def test_each_stage_leaves_the_attributes_that_lightning_leaves(tmp_path):
    for lightnings, plain, gpt in run_ranks(2, _all_stages, str(tmp_path)):
        for stage in STAGES:
            assert {k: v for k, v in plain[stage].items() if lightnings[stage].get(k) != v} == {}, stage
            assert {k: v for k, v in gpt[stage].items() if lightnings[stage].get(k) != v} == {}, stage
