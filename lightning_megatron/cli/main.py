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
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """End the process."""
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
        arguments: Of the command line; by default the process's.
    """
    given_arguments = list(sys.argv[1:] if arguments is None else arguments)
    if given_arguments and given_arguments[0] in TRAINING:
        _train(given_arguments)
        return
    parser = _Parser(prog="lightning-megatron", description="Training with MegatronStrategy, and tools.")
    parser.add_argument("--version", action="version", version=f"lightning-megatron {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    training = {command: commands.add_parser(command, help=what, add_help=False) for command, what in TRAINING.items()}
    _add_export(commands.add_parser("export", help="make one file, or a directory for transformers, of a checkpoint"))
    _add_show(commands.add_parser("show", help="show which rank holds what, on which node"))
    _add_import(commands.add_parser("import", help="make a checkpoint of a directory of transformers"))
    _add_migrate(commands.add_parser("migrate", help="make a run of accelerate's or Megatron-LM's settings"))
    about = "make Megatron's indexed data (.bin, .idx) from text"
    _add_preprocess(commands.add_parser("preprocess", help=about, description=about))
    completion = commands.add_parser("completion", help="print what a shell reads to complete this command")
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
    parser.add_argument("source", help="accelerate's YAML, or: megatron-args -- ARGUMENTS OF MEGATRON-LM")
    parser.add_argument("--out", help="write the run here, and print what became of each setting")
    parser.add_argument("--overwrite", action="store_true", help="where --out is there already")
    parser.add_argument("--model", help="transformers' directory or name of it; of megatron-args gpt, bert or t5")
    parser.add_argument("--environment", action="store_true", help="read MEGATRON_LM_* variables, too")
    parser.add_argument("--devices", type=int, default=8, help="of megatron-args: GPUs of a machine (%(default)s)")
    parser.add_argument("--num-nodes", type=int, default=1, help="of megatron-args: machines (%(default)s)")
    parser.set_defaults(run=_migrate)


def _migrate(given: argparse.Namespace) -> None:
    from lightning_megatron.cli.migrate.command import run

    run(given)


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layout", help="sizes, such as tp=8,pp=4,world=64")
    parser.add_argument("--ranks-per-node", type=int, help="devices of a machine (8, or all where there are fewer)")
    parser.add_argument("--out", help="draw the grid into this .png, .svg or .pdf file, too")
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
    parser.add_argument("--tokenizer", help="of a directory: a tokenizer to put beside the weights")
    parser.add_argument("--dtype", help="of a directory: float32, bfloat16 or float16 (as the model came)")
    parser.add_argument("--max-shard-size", default="5GB", help="of a directory: of a file of weights (5GB)")
    parser.add_argument("--family", help="of a directory: transformers' model_type (what the model came from)")
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
        "--ignore", type=_words, action="extend", default=[], metavar="A,B", help="fields that change nothing"
    )
    parser.add_argument("--revision", help="of a name on the hub: branch, tag or commit")
    parser.set_defaults(run=_import)


def _import(given: argparse.Namespace) -> None:
    from lightning.pytorch import Trainer

    from lightning_megatron import AutoModule, MegatronStrategy

    if Path(given.checkpoint).exists():
        raise ValueError(f"{given.checkpoint} is there already.")
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
        "inputs", nargs="+", help="files and folders; .jsonl and .json files have a document in each line"
    )
    parser.add_argument("--out", required=True, help="prefix of the .bin and .idx files")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="'bytes', a tokenizer.json, a transformers folder or name (default: %(default)s)",
    )
    parser.add_argument(
        "--train-bpe", type=int, metavar="SIZE", help="train a tokenizer on the text: OUT.tokenizer.json"
    )
    # One word, not nargs="+", which would take the inputs behind it, too.
    parser.add_argument(
        "--json-keys", type=_words, default="text", help="keys of the lines' objects: A,B (default: %(default)s)"
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end of document (GPT)")
    parser.add_argument("--split-sentences", action="store_true", help="an item for each sentence (BERT, T5)")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenise (default: %(default)s)")
    parser.add_argument(
        "--suffixes", type=_words, default=".txt,.md,.py,.jsonl", help="which files of folders (default: %(default)s)"
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
