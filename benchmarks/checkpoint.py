"""Measures for how long a save stops training, against a step, a copy in memory and a plain torch.save.

    python benchmarks/checkpoint.py                # two ranks on CPUs, dp=2 with the distributed optimizer
    HIDDEN=1024 DEVICES=1 python benchmarks/checkpoint.py    # four times as large, on one rank, without peers

All sides run in turn in each of several rounds of one run, because the speed of a machine changes from one minute to
the next. The script prints a table; ``benchmarks/README.md`` has the figures and the machine they are from.
"""

import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_megatron import Checkpointing, GPTConfig, GPTModule, MegatronStrategy

HIDDEN, DEVICES = int(os.environ.get("HIDDEN", "512")), int(os.environ.get("DEVICES", "2"))
CONFIG = GPTConfig(num_layers=6, hidden_size=HIDDEN, num_attention_heads=8, vocab_size=8192, seq_length=64)
ROUNDS, STEPS_BETWEEN, INTERVAL = int(os.environ.get("ROUNDS", "7")), 2, 100
COPY = "a copy in memory"


class Tokens(Dataset):
    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(0, CONFIG.vocab_size, (CONFIG.seq_length,))}


class Rounds(Callback):
    """Saves in each way every few steps, and keeps the seconds of steps and saves and the rise of the memory peak."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.busy: dict[str, list[float]] = defaultdict(list)  # processor time of this thread
        self.rise: dict[str, int] = {}
        self.size = 0
        self.warm: list[torch.Tensor] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seconds["a step"].append(time.perf_counter() - self.began)
        if trainer.global_step % STEPS_BETWEEN == 0:
            self._round(trainer, trainer.strategy.checkpointer)

    def _round(self, trainer: Trainer, checkpointer: Any) -> None:
        number = len(self.seconds[COPY])
        for name, asynchronous in (("synchronous save", False), ("asynchronous save", True)):
            path = self.folder / f"{name}-{number}.ckpt"
            checkpointer.asynchronous = asynchronous
            self._time(trainer, name, lambda path=path: trainer.save_checkpoint(path), checkpointer.wait)
        tensors = [tensor for _, tensor in checkpointer._planners[True].last.items]
        self.size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.warm = self.warm or [torch.zeros_like(tensor) for tensor in tensors]
        self._time(trainer, COPY, lambda: [a.copy_(b) for a, b in zip(self.warm, tensors, strict=True)])
        file = self.folder / f"plain-{trainer.global_rank}-{number}.pt"
        self._time(trainer, "torch.save of the same bytes", lambda: self._plain(file))
        file.unlink()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            for path in self.folder.glob("*.ckpt"):
                shutil.rmtree(path)

    def _time(
        self, trainer: Trainer, name: str, action: Callable[[], Any], wait: Callable[[], Any] = lambda: None
    ) -> None:
        trainer.strategy.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of memory
        before, start, busy = memory("VmRSS"), time.perf_counter(), time.thread_time()
        action()
        self.seconds[name].append(time.perf_counter() - start)
        self.busy[name].append(time.thread_time() - busy)
        wait()
        self.rise[name] = max(self.rise.get(name, 0), memory("VmHWM") - before)

    def _plain(self, path: Path) -> None:
        with path.open("wb") as file:
            torch.save(self.warm, file)
            file.flush()
            os.fsync(file.fileno())


def memory(name: str) -> int:
    """The bytes of memory that this process uses now (VmRSS) or used at its peak (VmHWM)."""
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    folder = Path(os.environ.setdefault("CHECKPOINT_BENCHMARK", tempfile.mkdtemp()))
    rounds = Rounds(folder)
    trainer = Trainer(
        accelerator="cpu", devices=DEVICES, strategy=MegatronStrategy(checkpointing=Checkpointing(async_save=True)),
        callbacks=[rounds], max_steps=(ROUNDS + 1) * STEPS_BETWEEN,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(GPTModule(CONFIG), DataLoader(Tokens(), batch_size=4))
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        report(rounds)
        shutil.rmtree(folder)


def report(rounds: Rounds) -> None:
    step, first = middle(rounds.seconds.pop("a step")[STEPS_BETWEEN:]), rounds.seconds["asynchronous save"][0]
    print(f"\nthis rank's part: {rounds.size / 1e6:.0f} MB; a step: {step:.3f} s; load: {os.getloadavg()[0]:.1f}")
    print(
        f"| {ROUNDS} rounds | median, s | minimum, s | of 100 steps | of a copy: median | minimum"
        " | processor time | memory |"
    )
    print("|---|---|---|---|---|---|---|---|")
    copies = rounds.seconds[COPY][1:]
    for name, every in rounds.seconds.items():
        seconds = every[1:]  # the first save makes plans and buffers
        busy = middle(rounds.busy[name][1:]) / middle(rounds.busy[COPY][1:])
        ratio = middle([a / b for a, b in zip(seconds, copies, strict=True)])
        print(
            f"| {name} | {middle(seconds):.4f} | {min(seconds):.4f} | {100 * middle(seconds) / (INTERVAL * step):.2f} %"
            f" | {ratio:.2f} | {min(seconds) / min(copies):.2f} | {busy:.2f}"
            f" | {100 * rounds.rise[name] / rounds.size:.0f} % |"
        )
    print("processor time: that of this thread, as a multiple of a copy's, medians")
    print("memory: by how much the peak rose, as a share of this rank's part")
    print(f"the first asynchronous save, into newly mapped memory: {first:.3f} s, {first / middle(copies):.1f} copies")


if __name__ == "__main__":
    main()
