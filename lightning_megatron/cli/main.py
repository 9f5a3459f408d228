"""The ``lightning-megatron`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from lightning_megatron import __version__
from lightning_megatron.cli import auto_module_help
from lightning_megatron.distributed import rank_server

TRAINING = {
    "fit": "train: --config run.yaml, and --help for every argument",
    "validate": "evaluate on the validation set",
    "test": "evaluate on the test set",
    "predict": "predict",
}
# The other commands: a module of ``cli.commands`` for each, and what it does.
COMMANDS = {
    "check": ("check", "check a run before it starts, without its devices: layout, memory, data"),
    "export": ("export", "write a checkpoint as one file, or as a directory that transformers or peft loads"),
    "show": ("show", "show which part of the model each rank holds, and on which node"),
    "import": ("import_pretrained", "write a pretrained model of transformers as a checkpoint"),
    "migrate": ("migrate", "translate the settings of Accelerate or Megatron-LM into a run of this command"),
    "preprocess": ("preprocess", "write text as Megatron's indexed data (.bin and .idx files)"),
    "completion": ("completion", "print the script by which a shell completes this command"),
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line, and end the process."""
        from lightning_megatron.cli.error_messages import explain

        _, is_missing, names = message.partition("arguments are required: ")
        if is_missing and not names.startswith("-"):  # what has no name before it, which no --config file may give
            told = f"{names.replace(', ', ' and ')} {'are' if ', ' in names else 'is'} missing"
            usage = " ".join(self.format_usage().split())
            self.exit(2, f"error: {told}; {usage}\nSee {self.prog} --help\n")
        self.exit(2, f"error: {explain(message, self._option_string_actions)}\nSee {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; without arguments, print its help.

    Args:
        arguments: The command's arguments; by default those of this process.
    """
    given_arguments = list(sys.argv[1:] if arguments is None else arguments)
    if given_arguments and given_arguments[0] in TRAINING:
        _train(given_arguments)
        return
    parser, training = _parsers()
    if not given_arguments:
        parser.print_help()
        return
    first = given_arguments[0]
    if first.startswith("-") and not any(known.startswith(first) for known in parser._option_string_actions):
        parser.error(f"unrecognized arguments: {first}")  # argparse would say that a command is missing
    own, behind = _split(given_arguments)
    given, more = parser.parse_known_args(own, argparse.Namespace(behind=behind, parser=parser, training=training))
    if more and not hasattr(given, "more"):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    given.more = more
    try:
        given.run(given)
    except (ValueError, OSError, ModuleNotFoundError, _checkpoint_error()) as error:
        sys.exit(f"lightning-megatron: {error}")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The command's parser, and those of the commands that train, which get their arguments elsewhere."""
    parser = _Parser(
        prog="lightning-megatron",
        description="Train with MegatronStrategy, and prepare, inspect and convert what a training needs.",
    )
    parser.add_argument("--version", action="version", version=f"lightning-megatron {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    training = {name: commands.add_parser(name, help=what, add_help=False) for name, what in TRAINING.items()}
    for name, (module, what) in COMMANDS.items():
        command: Any = import_module(f"lightning_megatron.cli.commands.{module}_command")
        own = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser, training


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before ``--``, and those behind it, which are another command's."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:cut], arguments[cut + 1 :]


def _train(arguments: list[str]) -> None:
    from lightning_megatron.cli.early_check import read

    run = read(arguments[1:])
    faults = run.find_faults()
    if not faults and not run.may_name_module:
        faults = ["--model is required; give it here or in a --config file, such as examples/recipes/tiny.yaml"]
    if faults:
        errors = "\n".join(f"error: {fault}" for fault in faults)
        sys.stderr.write(f"{errors}\nSee lightning-megatron {arguments[0]} --help\n")
        sys.exit(2)
    if run.asks_for_auto_module:
        auto_module_help.print_help()
        return
    if run.devices > 1 and arguments == sys.argv[1:] and _starts_ranks():
        print(f"Starting {run.devices} ranks: importing torch, Lightning and megatron-core.", file=sys.stderr)
        rank_server.start(main, "lightning_megatron.cli.training")
    try:
        from lightning_megatron.cli.training import MegatronCLI
    except KeyboardInterrupt:  # Python's traceback would show nothing but the import that it was at
        sys.exit(130)

    MegatronCLI(args=None if arguments == sys.argv[1:] else arguments)


def _starts_ranks() -> bool:
    """Whether this process starts the other ranks: neither torchrun nor a cluster does, and it is none of them.

    Where there are GPUs, ranks start as copies of the command: whether CUDA works in processes that are forked from one
    which has imported everything was never tried.
    """
    others = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "SLURM_JOB_ID", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE")
    started_elsewhere = any(name in os.environ for name in others)
    has_gpus = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
    return os.environ.get(rank_server.OFF) != "0" and not started_elsewhere and not has_gpus


def _checkpoint_error() -> type[Exception]:
    """The error of checkpoints, if the command has imported what raises it."""
    manifest = sys.modules.get("lightning_megatron.checkpoint.manifest")
    return manifest.CheckpointError if manifest else ValueError
