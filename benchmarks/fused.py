"""Measures the processor time of training steps with the operations of a layer joined, against one by one.

Both sides train the same model on the same rows in turn in this process; ``--model`` is a GPT-2 or a Llama. The first
round of each side, in which it compiles, is told apart.
"""

import argparse
import statistics
import time
from dataclasses import replace

import lightning.pytorch as pl
from timing import BATCH, CONFIG, QUIET, WARM_UP, adamw, rows
from torch.utils.data import DataLoader

from lightning_megatron import GPTModule, Kernels, MegatronStrategy

MODELS = {
    "gpt2": CONFIG,
    "llama": replace(
        CONFIG, num_query_groups=4, ffn_hidden_size=768, position_embedding="rope", normalization="RMSNorm",
        activation="swiglu", bias=False,
    ),
}  # fmt: skip


class ProcessorTime(pl.Callback):
    """Measures the processor time of this process from the end of the warm-up to the end of training."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == WARM_UP:
            self.start = time.process_time()

    def on_train_end(self, trainer, module):
        self.seconds = time.process_time() - self.start


def seconds_per_step(config, fused: bool, steps: int) -> float:
    clock = ProcessorTime()
    strategy = MegatronStrategy(kernels=Kernels(fused_layers=fused))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=steps + WARM_UP, callbacks=[clock], **QUIET
    )
    data = DataLoader(rows(BATCH * (steps + WARM_UP)), batch_size=BATCH)
    trainer.fit(GPTModule(config, optimizer=adamw), data)
    return clock.seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    start = time.perf_counter()
    seconds_per_step(MODELS[args.model], True, 1)
    print(f"{args.model}: the first {WARM_UP + 1} steps took {time.perf_counter() - start:.0f} s, compilation included")
    sides: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(args.rounds):
        for fused, seen in sides.items():
            seen.append(seconds_per_step(MODELS[args.model], fused, args.steps))
    for fused, seen in sides.items():
        each = ", ".join(f"{1000 * x:.0f}" for x in seen)
        print(f"  fused_layers={fused}: {1000 * statistics.median(seen):.0f} ms of processor time a step, of {each}")
    print(f"  ratio of medians {statistics.median(sides[False]) / statistics.median(sides[True]):.3f}", flush=True)


if __name__ == "__main__":
    main()
