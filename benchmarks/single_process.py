"""Tokens per second on one process: MegatronStrategy's GPT against vanilla Lightning with transformers' GPT-2.

Same shape, batch and optimizer; the two sides run in turn in this process, medians of several rounds.
"""

import argparse
import statistics
import time

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy

LAYERS, HIDDEN, HEADS, LENGTH, BATCH, VOCABULARY = 4, 256, 8, 256, 8, 257
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Vanilla(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=384, n_positions=LENGTH, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False,
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return adamw(self.parameters())


class Clock(pl.Callback):
    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.start = warm_up, 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.warm_up:
            self.start = time.perf_counter()

    def on_train_end(self, trainer, module):
        self.seconds = time.perf_counter() - self.start


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def tokens_per_second(module: pl.LightningModule, strategy, steps: int, warm_up: int = 2) -> float:
    clock = Clock(warm_up)
    rows = [{"input_ids": torch.randint(VOCABULARY, (LENGTH,))} for _ in range(BATCH * (steps + warm_up))]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=steps + warm_up, callbacks=[clock], **QUIET
    )
    trainer.fit(module, DataLoader(rows, batch_size=BATCH))
    return steps * BATCH * LENGTH / clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    config = GPTConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, vocab_size=VOCABULARY, seq_length=LENGTH,
        activation="gelu_tanh",
    )  # fmt: skip
    ours, theirs = [], []
    for _ in range(args.rounds):
        ours.append(tokens_per_second(GPTModule(config, optimizer=adamw), MegatronStrategy(), args.steps))
        theirs.append(tokens_per_second(Vanilla(), "auto", args.steps))
    for name, seen in (("MegatronStrategy", ours), ("vanilla Lightning", theirs)):
        print(f"{name}: {statistics.median(seen):.0f} tokens/s of {', '.join(f'{x:.0f}' for x in seen)}")
    print(f"ratio of medians {statistics.median(ours) / statistics.median(theirs):.2f}")


if __name__ == "__main__":
    main()
