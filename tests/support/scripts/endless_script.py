"""Trains until it is interrupted; started by ``test_interrupts.py``, with a way of launching."""

import sys

from lightning.pytorch import Callback, Trainer

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy
from lightning_megatron.data import TextDataModule


class Tell(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.is_global_zero:
            print("step", trainer.global_step, flush=True)


if __name__ == "__main__":
    config = GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=257, seq_length=32)
    trainer = Trainer(
        accelerator="cpu",
        devices=4,
        strategy=MegatronStrategy(tp=2, pp=2, launch=sys.argv[1]),
        max_epochs=-1,
        callbacks=[Tell()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(GPTModule(config), TextDataModule(seq_length=32, batch_size=8))
