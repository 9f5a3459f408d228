"""``lightning-megatron migrate``: the settings of Accelerate or Megatron-LM as a run of this command."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the arguments."""
    parser.add_argument("source", help="Accelerate's YAML file, or: megatron-args -- ARGUMENTS OF MEGATRON-LM")
    parser.add_argument("--out", help="write the run into this file, and print what became of each setting")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out if it exists")
    parser.add_argument(
        "--model", help="directory or name of the model of transformers; with megatron-args gpt, bert or t5"
    )
    parser.add_argument("--environment", action="store_true", help="also read MEGATRON_LM_* environment variables")
    parser.add_argument(
        "--devices", type=int, default=8, help="with megatron-args: GPUs of each machine (default: %(default)s)"
    )
    parser.add_argument(
        "--num-nodes", type=int, default=1, help="with megatron-args: number of machines (default: %(default)s)"
    )


def run(given: argparse.Namespace) -> None:
    """Print the run that the settings make, or write it."""
    from lightning_megatron.cli.migrate import command

    command.run(given)
