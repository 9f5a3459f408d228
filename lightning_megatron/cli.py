"""The ``lightning-megatron`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_megatron.checkpoint import CheckpointError
from lightning_megatron.checkpoint.export import export


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: Of the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(prog="lightning-megatron", description="Tools around MegatronStrategy.")
    commands = parser.add_subparsers(required=True)
    merging = commands.add_parser("export", help="merge a sharded checkpoint's weights into one file")
    merging.add_argument("checkpoint", help="the checkpoint's directory")
    merging.add_argument("out", help="a .safetensors file, or a .ckpt file for a plain LightningModule")
    merging.set_defaults(run=lambda given: print(export(given.checkpoint, given.out)))
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (CheckpointError, ValueError, OSError) as error:
        sys.exit(f"lightning-megatron: {error}")
