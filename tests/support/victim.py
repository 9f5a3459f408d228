"""A run that is killed again and again, and each time goes on from its last whole checkpoint."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_megatron import Checkpointing, GPTModule
from lightning_megatron.checkpoint import manifest, newest
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.trainer import trainer

CONFIG = plain_gpt.replace(plain_gpt.GPT2, num_layers=2, hidden_dropout=0.1, attention_dropout=0.1)
LAYOUT = Layout(tp=2)
KILLS = int(os.environ.get("FAULT_KILLS", "16"))
STEPS = 5 * KILLS // 2


class Begun(Callback):
    """Says when training goes on."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.mark.touch()


def train(folder: str, mark: str, asynchronous: bool, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Train on from what is there; the weights at the end."""
    seed_everything(3, verbose=False)
    module = GPTModule(CONFIG)
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, filename="{step}")
    run = trainer(
        LAYOUT,
        {"checkpointing": Checkpointing(async_save=asynchronous)},
        max_steps=steps,
        max_epochs=-1,
        callbacks=[Begun(Path(mark)), keep],
        enable_checkpointing=True,
    )
    data = DataLoader(Rows(text_samples(CONFIG, 48)), batch_size=4, shuffle=True)
    run.fit(module, data, ckpt_path=newest(Path(folder)))
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def train_and_die(folder: str, mark: str, at: int, steps: int) -> None:
    """As ``train``, but rank 0 kills itself at the ``at``-th thing that is done to files once the first is there."""
    done = [0]

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if os.environ["RANK"] == "0" and (Path(folder) / "step=1.ckpt").exists():
                done[0] += 1
                if done[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "unlink"), (manifest, "_exchange"),
                        (os, "unlink"), (os, "rmdir")):  # fmt: skip
        setattr(owner, name, counted(getattr(owner, name)))
    train(folder, mark, False, steps)
