"""The ``lightning-megatron`` command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from lightning_megatron import __version__
from lightning_megatron.checkpoint import CheckpointError
from lightning_megatron.checkpoint.consolidate import SUFFIXES, export


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line, and end the process."""
        from lightning_megatron.cli.error_messages import explain

        self.exit(2, f"error: {explain(message, self._option_string_actions)}\nSee {self.prog} --help\n")


TRAINING = {
    "fit": "train: --config run.yaml, and --help for every argument",
    "validate": "evaluate on the validation set",
    "test": "evaluate on the test set",
    "predict": "predict",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command's arguments; by default those of this process.
    """
    given_arguments = list(sys.argv[1:] if arguments is None else arguments)
    if given_arguments and given_arguments[0] in TRAINING:
        _train(given_arguments)
        return
    parser = _Parser(
        prog="lightning-megatron",
        description="Train with MegatronStrategy, and prepare, inspect and convert what a training needs.",
    )
    parser.add_argument("--version", action="version", version=f"lightning-megatron {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    training = {command: commands.add_parser(command, help=what, add_help=False) for command, what in TRAINING.items()}
    _add_export(
        commands.add_parser("export", help="write a checkpoint as one file, or as a directory that transformers loads")
    )
    _add_show(commands.add_parser("show", help="show which part of the model each rank holds, and on which node"))
    _add_import(commands.add_parser("import", help="write a pretrained model of transformers as a checkpoint"))
    _add_migrate(
        commands.add_parser(
            "migrate", help="translate the settings of Accelerate or Megatron-LM into a run of this command"
        )
    )
    about = "write text as Megatron's indexed data (.bin and .idx files)"
    _add_preprocess(commands.add_parser("preprocess", help=about, description=about))
    completion = commands.add_parser("completion", help="print the script by which a shell completes this command")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(run=lambda given: _complete(given.shell, parser, training))
    own, behind = _split(given_arguments)
    given = parser.parse_args(own)
    given.behind = behind
    try:
        given.run(given)
    except (CheckpointError, ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"lightning-megatron: {error}")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before ``--``, and those behind it, which are another command's."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:cut], arguments[cut + 1 :]


def _train(arguments: list[str]) -> None:
    from lightning_megatron.cli.training import MegatronCLI

    MegatronCLI(args=None if arguments == sys.argv[1:] else arguments)


def _complete(shell: str, parser: argparse.ArgumentParser, training: Mapping[str, argparse.ArgumentParser]) -> None:
    from lightning_megatron.cli.shell_completion import script

    print(script(shell, parser, training))


def _add_migrate(parser: argparse.ArgumentParser) -> None:
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
    parser.set_defaults(run=_migrate)


def _migrate(given: argparse.Namespace) -> None:
    from lightning_megatron.cli.migrate.command import run

    run(given)


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layout", help="parallel sizes, such as tp=8,pp=4,world=64")
    parser.add_argument(
        "--ranks-per-node", type=int, help="devices of each machine (default: 8, or all ranks if there are fewer)"
    )
    parser.add_argument("--out", help="also draw the grid into this .png, .svg or .pdf file")
    parser.set_defaults(run=_show)


def _show(given: argparse.Namespace) -> None:
    from lightning_megatron.cli.rank_grid import RankGrid

    grid = RankGrid.parse(given.layout, given.ranks_per_node)
    print(grid.text())
    for warning in grid.warnings():
        print(f"\nWarning: {warning}")
    if given.out:
        print(f"\n{grid.draw(given.out)}")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="the checkpoint's directory")
    parser.add_argument(
        "out", help="a directory for transformers; a .safetensors file; or a .ckpt file for a plain LightningModule"
    )
    parser.add_argument("--tokenizer", help="with a directory: a tokenizer to save there too")
    parser.add_argument(
        "--dtype",
        help="with a directory: float32, bfloat16 or float16 (default: the type that the model was loaded in)",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        help="with a directory: largest size of a file of weights (default: %(default)s)",
    )
    parser.add_argument(
        "--family", help="with a directory: transformers' model_type (default: that of the model that was loaded)"
    )
    parser.set_defaults(run=_export)


def _export(given: argparse.Namespace) -> None:
    if Path(given.out).suffix in SUFFIXES:
        print(export(given.checkpoint, given.out))
        return
    from lightning_megatron.models.export_checkpoint import export_pretrained

    path = export_pretrained(
        given.checkpoint,
        given.out,
        tokenizer=given.tokenizer,
        dtype=given.dtype,
        max_shard_size=given.max_shard_size,
        family=given.family,
    )
    print(path)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a directory with config.json and weights, or a name on the Hugging Face hub")
    parser.add_argument("checkpoint", help="the checkpoint to write, for load_weights and load_from_checkpoint")
    parser.add_argument(
        "--ignore",
        type=_words,
        action="extend",
        default=[],
        metavar="A,B",
        help="fields of config.json to ignore, since they do not change this model",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    parser.set_defaults(run=_import)


def _import(given: argparse.Namespace) -> None:
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


def _add_preprocess(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", help="text files and folders; each line of a .jsonl or .json file is a document"
    )
    parser.add_argument("--out", required=True, help="path of the .bin and .idx files, without the ending")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="'bytes', a tokenizer.json, or a directory or name of transformers (default: %(default)s)",
    )
    parser.add_argument(
        "--train-bpe",
        type=int,
        metavar="SIZE",
        help="train a tokenizer with SIZE tokens on the text, and write it to OUT.tokenizer.json",
    )
    # One word, not nargs="+", which would take the inputs behind it, too.
    parser.add_argument(
        "--json-keys",
        type=_words,
        default="text",
        help="keys of the JSON objects that hold text: A,B (default: %(default)s)",
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token (for GPT)"
    )
    parser.add_argument(
        "--split-sentences", action="store_true", help="store each sentence as an item of its own (for BERT and T5)"
    )
    parser.add_argument("--workers", type=int, default=1, help="number of tokenizing processes (default: %(default)s)")
    parser.add_argument(
        "--suffixes",
        type=_words,
        default=".txt,.md,.py,.jsonl",
        help="endings of the files to take from folders (default: %(default)s)",
    )
    parser.set_defaults(run=_preprocess)


def _words(text: str) -> list[str]:
    words = [word for part in text.split(",") if (word := part.strip())]
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; give one, or several as A,B")
    return words


def _preprocess(given: argparse.Namespace) -> None:
    from lightning_megatron.data.preprocess import preprocess, train_tokenizer

    if given.workers < 1:
        raise ValueError(f"--workers {given.workers}: use 1 or more.")
    tokenizer = given.tokenizer
    if given.train_bpe is not None:
        if tokenizer != "bytes":
            raise ValueError(f"--train-bpe {given.train_bpe} makes a tokenizer, and --tokenizer {tokenizer} names one.")
        path = Path(f"{given.out}.tokenizer.json")
        tokenizer = train_tokenizer(given.inputs, given.train_bpe, path, given.json_keys, given.suffixes)
        print(tokenizer)
    for summary in preprocess(
        given.inputs,
        given.out,
        tokenizer,
        given.json_keys,
        given.append_eod,
        given.split_sentences,
        given.workers,
        given.suffixes,
    ):
        print(summary)
