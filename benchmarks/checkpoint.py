"""What a checkpoint costs: seconds for which training waits, against a step, a copy in memory and a plain torch.save.

    python benchmarks/checkpoint.py                # two ranks on CPUs, dp=2 with the distributed optimizer
    HIDDEN=1024 python benchmarks/checkpoint.py    # four times as large

Prints a table; ``benchmarks/README.md`` keeps the figures with the machine they are from.
"""

import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy

HIDDEN = int(os.environ.get("HIDDEN", "512"))
CONFIG = GPTConfig(num_layers=6, hidden_size=HIDDEN, num_attention_heads=8, vocab_size=8192, seq_length=64)
SAVES, STEPS_BETWEEN, INTERVAL = 4, 4, 100


class Tokens(Dataset):
    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(0, CONFIG.vocab_size, (CONFIG.seq_length,))}


class Saves(Callback):
    """Saves every few steps, and keeps the seconds of steps and of saves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps, self.blocked, self.peak = folder, [], [], 0

    def on_train_batch_start(self, *_) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, *_) -> None:
        self.steps.append(time.perf_counter() - self.began)
        if trainer.global_step % STEPS_BETWEEN == 0:
            trainer.strategy.checkpointer.wait()  # what is measured is one save, not the queue of two
            trainer.strategy.barrier()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            start = time.perf_counter()
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")
            self.blocked.append(time.perf_counter() - start)
            self.peak = max(self.peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def run(asynchronous: bool, folder: Path) -> tuple[Saves, Trainer]:
    saves = Saves(folder)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=MegatronStrategy(async_save=asynchronous), callbacks=[saves],
        max_steps=SAVES * STEPS_BETWEEN, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(GPTModule(CONFIG), DataLoader(Tokens(), batch_size=4))
    return saves, trainer


def copied_and_saved(trainer: Trainer, folder: Path) -> tuple[float, float, int]:
    """Seconds to copy this rank's part in memory, and to torch.save it, and its bytes."""
    kept = trainer.strategy.checkpointer._copies._kept
    warm = [torch.empty_like(tensor) for tensor in kept]
    copies = []
    for _ in range(3):
        start = time.perf_counter()
        for to, tensor in zip(warm, kept, strict=True):
            to.copy_(tensor)
        copies.append(time.perf_counter() - start)
    start = time.perf_counter()
    with (folder / f"plain-{trainer.global_rank}.pt").open("wb") as file:
        torch.save(kept, file)
        file.flush()
        os.fsync(file.fileno())
    return min(copies[1:]), time.perf_counter() - start, sum(t.numel() * t.element_size() for t in kept)


def main() -> None:
    folder = Path(os.environ.setdefault("CHECKPOINT_BENCHMARK", tempfile.mkdtemp()))
    plain, trainer = run(False, folder / "sync")
    beside, trainer = run(True, folder / "async")
    copy, saved, size = copied_and_saved(trainer, folder)
    if trainer.is_global_zero:
        step = sorted(plain.steps)[len(plain.steps) // 2]
        blocked = {"synchronous": plain.blocked[1:], "asynchronous": beside.blocked[1:]}
        print(f"\nthis rank's part: {size / 1e6:.0f} MB; a step: {step:.3f} s; load: {os.getloadavg()[0]:.1f}")
        print("| what waits | seconds (median, saves 2 to 4) | of 100 steps | of a copy in memory |\n|---|---|---|---|")
        for name, seconds in {**blocked, "a copy in memory": [copy], "torch.save of the same bytes": [saved]}.items():
            middle = sorted(seconds)[len(seconds) // 2]
            print(f"| {name} | {middle:.3f} | {100 * middle / (INTERVAL * step):.2f} % | {middle / copy:.2f} |")
        rise = plain.peak * 1024 / size
        print(f"the synchronous saves raised the peak of memory by {100 * rise:.0f} % of the part that was written")


if __name__ == "__main__":
    main()
