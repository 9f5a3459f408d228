"""Trains four ranks for a few steps, with checkpoints and validation. Started by ``test_terminal.py``."""

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy
from lightning_megatron.data import TextDataModule

if __name__ == "__main__":
    seed_everything(1)
    config = GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=257, seq_length=32)
    trainer = Trainer(
        accelerator="cpu",
        devices=4,
        strategy=MegatronStrategy(tp=2, pp=2, micro_batch_size=2),
        max_steps=6,
        limit_val_batches=1,
        callbacks=[ModelCheckpoint("kept", every_n_train_steps=2, save_last=True)],
    )
    module, data = GPTModule(config), TextDataModule(seq_length=32, batch_size=8)
    trainer.fit(module, data)
    trainer.validate(module, data)
