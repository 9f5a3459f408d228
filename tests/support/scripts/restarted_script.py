"""Eight steps on two ranks; where a file says so, rank 1 is killed in the sixth, once. For ``torchrun``'s restarts."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_megatron import Checkpointing, GPTModule
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.trainer import trainer
from tests.support.victim import CONFIG


class Killed(Callback):
    """Notes where training begins; dies if a file says so, which it removes."""

    def __init__(self, order: Path) -> None:
        self.order, self.began = order, -1

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self.began = trainer.global_step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5 and trainer.global_rank == 1 and self.order.exists():
            trainer.strategy.checkpointer.wait()
            self.order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    asynchronous = (folder / "kill-async").exists()
    seed_everything(3, verbose=False)
    killed = Killed(folder / ("kill-async" if asynchronous else "kill"))
    keep = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True, save_top_k=1, filename="{step}")
    run = trainer(
        Layout(dp=2), {"checkpointing": Checkpointing(async_save=asynchronous)}, max_steps=8, max_epochs=-1,
        callbacks=[killed, keep], enable_checkpointing=True,
    )  # fmt: skip
    module = GPTModule(CONFIG)
    data = DataLoader(Rows(text_samples(CONFIG, 48)), batch_size=4, shuffle=True)
    run.fit(module, data, ckpt_path="last")
    if run.is_global_zero:
        torch.save({"from": killed.began, "weights": dict(module.named_parameters())}, folder / "end.pt")
