"""``lightning-megatron import``: a pretrained model of transformers as a checkpoint."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from lightning_megatron.cli.commands.words import words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the arguments."""
    parser.add_argument("source", help="a directory with config.json and weights, or a name on the Hugging Face hub")
    parser.add_argument("checkpoint", help="the checkpoint to write, for load_weights and load_from_checkpoint")
    parser.add_argument(
        "--ignore",
        type=words,
        action="extend",
        default=[],
        metavar="A,B",
        help="fields of config.json to ignore, since they do not change this model",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")


def run(given: argparse.Namespace) -> None:
    """Run the command."""
    from lightning.pytorch import Trainer

    from lightning_megatron import AutoModule, MegatronStrategy

    if Path(given.checkpoint).exists():
        raise ValueError(f"{given.checkpoint} exists already. Remove it, or name another directory.")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    module = AutoModule.from_pretrained(given.source, ignore=given.ignore, revision=given.revision)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=MegatronStrategy(),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module, [])  # builds the model, and runs nothing
    trainer.save_checkpoint(given.checkpoint, weights_only=True)
    print(given.checkpoint)
