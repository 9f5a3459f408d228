"""Train a small GPT on the Python standard library's source, with tensor and pipeline parallelism, on a CPU."""

import argparse
import math

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy
from lightning_megatron.data import TextDataModule


def main() -> None:
    """Parse the options, train the model, save a checkpoint and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--output", default="checkpoints/gpt-stdlib", help="directory for the checkpoint")
    parser.add_argument("--log", help="directory for the loss curves, as metrics.csv")
    args = parser.parse_args()

    seed_everything(1234)
    data = TextDataModule(seq_length=128, batch_size=16)
    config = GPTConfig(
        num_layers=4, hidden_size=128, num_attention_heads=4, vocab_size=257, seq_length=128, activation="gelu_tanh"
    )
    module = GPTModule(config, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3))
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=MegatronStrategy(tp=args.tp, pp=args.pp),
        precision=args.precision,
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 4),
        check_val_every_n_epoch=None,
        limit_val_batches=4,
        num_sanity_val_steps=2,
        gradient_clip_val=1.0,
        log_every_n_steps=2,
        enable_checkpointing=False,
        logger=CSVLogger(args.log, name="", version="") if args.log else False,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(args.output)
    if trainer.is_global_zero:
        loss = trainer.callback_metrics
        print(f"train_loss {loss['train_loss']:.3f} (a uniform guess has {math.log(257):.3f})")
        print(f"val_loss {loss['val_loss']:.3f}, checkpoint in {args.output}")


if __name__ == "__main__":
    main()
