"""What Lightning offers and the strategy does not do: refused by name on every rank, before training."""

import functools
import re
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger

from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, OurGPT
from tests.support.plain_module import CountingModule, plain_data
from tests.support.ranks import run_ranks
from tests.support.trainer import trainer


class Backward(CountingModule):
    def backward(self, loss):
        loss.backward()


class Iterates(CountingModule):
    def training_step(self, dataloader_iter):
        return super().training_step(*next(dataloader_iter)[:2])


class Skips(CountingModule):
    def training_step(self, batch, batch_idx):
        return None


class Manual(CountingModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Several(CountingModule):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.layers[i].parameters(), lr=0.1) for i in (0, 2)]


class NoOptimizer(CountingModule):
    def configure_optimizers(self):
        return None


class ManualBackward(CountingModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        return loss


class MetaAccelerator(CPUAccelerator):
    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("meta")] * 2


def _with_averages() -> dict[str, Any]:
    return {"callbacks": [EMAWeightAveraging()]}


def _with_graph() -> dict[str, Any]:
    return {"logger": TensorBoardLogger(".", log_graph=True)}


# name: the module, options of the Trainer, the message
CASES: dict[str, tuple[Any, Any, str]] = {
    "backward": (Backward, dict, r"Backward.backward would never be called"),
    "dataloader_iter": (Iterates, dict, r"training_step\(batch, batch_idx\)"),
    "None": (Skips, dict, r"returned None. MegatronStrategy cannot skip a batch"),
    "manual optimization": (
        Manual,
        dict,
        r"one optimizer and automatic optimization; seen: 1 optimizers, automatic_op",
    ),
    "several optimizers": (Several, dict, "Training with multiple optimizers"),
    "no optimizer": (NoOptimizer, dict, "configure_optimizers returned None"),
    "manual_backward": (ManualBackward, dict, "automatic optimization"),
    "sync_batchnorm": (CountingModule, lambda: {"sync_batchnorm": True}, r"Trainer\(sync_batchnorm=True\)"),
    "compiled module": (
        lambda: torch.compile(CountingModule(), backend="eager"),
        dict,
        "avoid passing in compiled model",
    ),
    "EMAWeightAveraging": (lambda: OurGPT(CONFIG), _with_averages, "does not work with EMAWeightAveraging and OurGPT"),
    "log_graph": (lambda: OurGPT(CONFIG), _with_graph, "only rank 0 would run OurGPT"),
    "accelerator": (CountingModule, lambda: {"accelerator": MetaAccelerator()}, "Use 'cpu' or 'gpu'"),
}


def _try(module: Any, options: Any) -> tuple[str, int]:
    made = module()
    try:
        if "accelerator" in (given := options()):
            run = Trainer(devices=2, strategy=Layout(dp=2).strategy(), logger=False, **given)
        else:
            run = trainer(Layout(dp=2), max_steps=2, **given)
        run.fit(made, plain_data())
    except Exception as error:
        return f"{type(error).__name__}: {error}", run.global_step
    return "trained", run.global_step


def _try_all() -> dict[str, tuple[str, int]]:
    return {name: _try(module, options) for name, (module, options, _) in CASES.items()}


@functools.cache
def seen() -> list[dict[str, tuple[str, int]]]:
    return run_ranks(2, _try_all)


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(name):
    for rank in seen():
        message, steps = rank[name]
        assert steps == 0
        assert re.search(CASES[name][2], message), message
