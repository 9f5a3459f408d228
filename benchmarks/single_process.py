"""Measures tokens per second on one process: MegatronStrategy's GPT against vanilla Lightning with transformers' GPT-2.

Both sides have the same shape, batch and optimizer. They run in turn in this process, and the script prints the medians
of several rounds.
"""

import argparse

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


def tokens_per_second(module: pl.LightningModule, strategy, steps: int) -> float:
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=steps + WARM_UP, callbacks=[clock], **QUIET
    )
    trainer.fit(module, DataLoader(rows(BATCH * (steps + WARM_UP)), batch_size=BATCH))
    return steps * BATCH * CONFIG.seq_length / clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    sides: dict[str, list[float]] = {"MegatronStrategy": [], "vanilla Lightning": []}
    for _ in range(args.rounds):
        sides["MegatronStrategy"].append(
            tokens_per_second(GPTModule(CONFIG, optimizer=adamw), MegatronStrategy(), args.steps)
        )
        sides["vanilla Lightning"].append(tokens_per_second(Vanilla(), "auto", args.steps))
    tell("one process", sides)


if __name__ == "__main__":
    main()
