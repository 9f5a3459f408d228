"""``lightning-megatron completion``: the script by which a shell completes the command."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the arguments."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(given: argparse.Namespace) -> None:
    """Run the command."""
    from lightning_megatron.cli.shell_completion import script

    print(script(given.shell, given.parser, given.training))
