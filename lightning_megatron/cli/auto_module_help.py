"""Prints the arguments of ``AutoModule.from_pretrained``, which jsonargparse has no help of: it is no class."""

from __future__ import annotations

PATH = "lightning_megatron.AutoModule.from_pretrained"
NAMES = ("AutoModule", "AutoModule.from_pretrained", "lightning_megatron.AutoModule", PATH)


def print_help() -> None:
    """Print the help of ``--model.help AutoModule``."""
    from jsonargparse import ArgumentParser

    from lightning_megatron import AutoModule

    parser = ArgumentParser(prog=f"--model={PATH}", description="Make the module of a pretrained model's family.")
    parser.add_method_arguments(AutoModule, "from_pretrained", "model")
    parser.print_help()
