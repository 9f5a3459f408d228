"""Measures the cost of the monitoring callbacks: one process without them, and with each of them, in turn.

Each callback logs at every step here, which is the most expensive setting; Lightning's default is every 50th step.
"""

import argparse

from lightning.pytorch import Trainer
from timing import BATCH, CONFIG, QUIET, WARM_UP, Clock, adamw, rows, tell
from torch.utils.data import DataLoader, SequentialSampler

from lightning_megatron import GPTModule, MegatronStrategy
from lightning_megatron.callbacks import MemoryMonitor, PhaseTimes, Throughput, TrainingMonitor

SIDES = {
    "none": [],
    "Throughput": [Throughput],
    "MemoryMonitor": [MemoryMonitor],
    "PhaseTimes": [PhaseTimes],
    "TrainingMonitor": [TrainingMonitor],
    "all": [Throughput, MemoryMonitor, PhaseTimes, TrainingMonitor],
}


def tokens_per_second(callbacks: list, steps: int) -> float:
    clock, data = Clock(), rows(BATCH * (steps + WARM_UP))
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=MegatronStrategy(micro_batch_size=2), max_steps=steps + WARM_UP,
        log_every_n_steps=1, gradient_clip_val=1.0, callbacks=[*(make() for make in callbacks), clock], **QUIET,
    )  # fmt: skip
    trainer.fit(GPTModule(CONFIG, optimizer=adamw), DataLoader(data, batch_size=BATCH, sampler=SequentialSampler(data)))
    return steps * BATCH * CONFIG.seq_length / clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    seen: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(args.rounds):
        for name, callbacks in SIDES.items():
            seen[name].append(tokens_per_second(callbacks, args.steps))
    for name in list(SIDES)[1:]:
        tell("tokens/s, one process", {name: seen[name], "none": seen["none"]})


if __name__ == "__main__":
    main()
