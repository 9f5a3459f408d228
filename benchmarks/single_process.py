"""Measures tokens per second on one process: MegatronStrategy's GPT against vanilla Lightning with transformers' GPT-2.

Both sides have the same shape, batch and optimizer. They run in turn in this process, and the script prints the medians
of several rounds, and the processor time of a step, which other work on the machine disturbs less.
"""

import argparse
import os
import statistics

import lightning.pytorch as pl
from timing import BATCH, CONFIG, QUIET, WARM_UP, Clock, adamw, rows, tell
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_megatron import GPTModule, MegatronStrategy


class Vanilla(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=384, n_positions=CONFIG.seq_length, n_embd=CONFIG.hidden_size, n_layer=CONFIG.num_layers,
            n_head=CONFIG.num_attention_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            attn_implementation="sdpa", use_cache=False,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return adamw(self.parameters())


def tokens_per_second(module: pl.LightningModule, strategy, steps: int, processor: list[float]) -> float:
    """Tokens per second of one run, whose steps' processor times are added to ``processor``."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=steps + WARM_UP, callbacks=[clock], **QUIET
    )
    trainer.fit(module, DataLoader(rows(BATCH * (steps + WARM_UP)), batch_size=BATCH))
    processor += clock.processor
    return steps * BATCH * CONFIG.seq_length / clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    sides: dict[str, list[float]] = {"MegatronStrategy": [], "vanilla Lightning": []}
    steps: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, seen in sides.items():
            ours = name == "MegatronStrategy"
            module = GPTModule(CONFIG, optimizer=adamw) if ours else Vanilla()
            strategy = MegatronStrategy() if ours else "auto"
            seen.append(tokens_per_second(module, strategy, args.steps, steps[name]))
    tell("one process", sides)
    print(f"processor time of a step, load {os.getloadavg()[0]:.1f}:")
    for which in (statistics.median, min):
        ours, theirs = (which(seen) for seen in steps.values())
        print(f"  {which.__name__}: {ours * 1e3:.0f} ms and {theirs * 1e3:.0f} ms, ratio {theirs / ours:.3f}")


if __name__ == "__main__":
    main()
