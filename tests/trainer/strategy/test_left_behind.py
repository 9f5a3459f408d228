"""What a user holds after a fit (callbacks, module, loaders) works in a plain Trainer, and is copied and pickled."""

import copy
import pickle
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_megatron import GPTModule, MegatronStrategy
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
