"""Measures what recomputing each module saves, in bytes of activations, and what it costs, in time.

All options run in turn, several rounds, in this process, on one micro-batch. Times are processor times on a CPU.
"""

import argparse
import statistics
import time

import lightning.pytorch as pl
import torch
from timing import QUIET, adamw
from torch.utils.data import DataLoader

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy
from lightning_megatron.training.saved_bytes import SavedBytes

SHAPES = {
    "gpt2": {"num_attention_heads": 12, "hidden_size": 768, "activation": "gelu_tanh"},
    "llama": {
        "num_attention_heads": 16, "num_query_groups": 8, "hidden_size": 1024, "ffn_hidden_size": 4096, "bias": False,
        "normalization": "RMSNorm", "activation": "swiglu", "position_embedding": "rope", "tie_embeddings": False,
    },
}  # fmt: skip
OPTIONS = (None, ["layernorm"], ["mlp_act"], ["core_attn"], ["mlp"], "selective", 1, "full")


class Meter(pl.Callback):
    """Counts the activations of the first step, and the seconds of those that follow."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.on_cpu = trainer.strategy.root_device.type == "cpu"
        if batch_idx == 0 and self.on_cpu:
            self.saved = SavedBytes(module.parameters())
            self.saved.__enter__()
        if not self.on_cpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self.start = time.process_time() if self.on_cpu else time.perf_counter()

    def on_train_batch_end(self, trainer, module, *_):
        if not self.on_cpu:
            torch.cuda.synchronize()
        self.seconds.append((time.process_time() if self.on_cpu else time.perf_counter()) - self.start)
        if len(self.seconds) == 1 and self.on_cpu:
            self.saved.__exit__()
        self.peak = self.saved.peak if self.on_cpu else torch.cuda.max_memory_allocated()  # there, states included


def measure(config: GPTConfig, rows: int, steps: int, precision: str, recompute) -> tuple[int, list[float]]:
    meter = Meter()
    trainer = pl.Trainer(
        accelerator="auto", devices=1, strategy=MegatronStrategy(recompute=recompute), max_steps=steps + 1,
        precision=precision, callbacks=[meter], **QUIET,
    )  # fmt: skip
    tokens = torch.randint(config.vocab_size, (rows * (steps + 1), config.seq_length))
    trainer.fit(GPTModule(config, optimizer=adamw), DataLoader([{"input_ids": row} for row in tokens], batch_size=rows))
    return meter.peak, meter.seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--dropout", type=float, default=0.0)
    args = parser.parse_args()
    config = GPTConfig(
        **SHAPES[args.shape], num_layers=args.layers, seq_length=args.length, vocab_size=512,
        hidden_dropout=args.dropout, attention_dropout=args.dropout,
    )  # fmt: skip
    peaks: dict[str, int] = {}
    seconds: dict[str, list[float]] = {str(option): [] for option in OPTIONS}
    for _ in range(args.rounds):
        for option in OPTIONS:
            peaks[str(option)], seen = measure(config, args.rows, args.steps, args.precision, option)
            seconds[str(option)] += seen
    plain = statistics.median(seconds["None"])
    print("| recompute | activations, MB | saved, MB | step, ms | more time | saved bytes per µs |")
    print("|---|---|---|---|---|---|")
    for name, seen in seconds.items():
        saved, cost = peaks["None"] - peaks[name], statistics.median(seen) - plain
        rate = f"{saved / cost / 1e6:,.0f}" if saved and cost > 0 else ""
        step = statistics.median(seen) * 1e3
        print(
            f"| `{name}` | {peaks[name] / 1e6:.1f} | {saved / 1e6:.1f} | {step:.0f} | {cost / plain:+.1%} | {rate} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
