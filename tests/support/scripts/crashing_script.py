"""Trains on four ranks, of which one fails in the way that is named. Started by ``test_crashes.py``."""

import os
import signal
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy

HOW, LAUNCH = sys.argv[1], None if sys.argv[2] == "external" else sys.argv[2]
BAD = 2


def is_bad(trainer: Any, how: str) -> bool:
    return how == HOW and trainer.global_rank == BAD


class Rows(Dataset):
    def __init__(self, broken: bool) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = [torch.arange(32)]
        return {"input_ids": rows[1 if self.broken and index == 17 else 0]}  # the dataset's line


class Mine(GPTModule):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if is_bad(self.trainer, "step") or HOW in ("all", "caught"):
            torch.zeros(3) @ torch.zeros(4)  # the step's line
        if is_bad(self.trainer, "memory"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().training_step(*args, **kwargs)

    def configure_model(self) -> None:
        if is_bad(self.trainer, "build"):
            open("/nowhere/vocab.json")  # noqa: SIM115  # the line of configure_model
        super().configure_model()

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(is_bad(self.trainer, "worker")), batch_size=8, num_workers=int(HOW == "worker"))


class Bad(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if is_bad(trainer, "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if is_bad(trainer, "exit"):
            sys.exit(3)
        if HOW == "first rank killed" and trainer.global_rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    config = GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=257, seq_length=32)
    strategy = MegatronStrategy(tp=2, pp=2, micro_batch_size=2, launch=LAUNCH)
    trainer = Trainer(
        accelerator="cpu", devices=4, strategy=strategy, max_steps=6, callbacks=[Bad()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(Mine(config))
    except RuntimeError as error:
        if HOW != "caught":
            raise
        print(f"caught {error}")
        sys.exit(7)
