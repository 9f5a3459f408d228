"""The ``lightning-megatron`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

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
    about = "make Megatron's indexed data (.bin, .idx) from text"
    _add_preprocess(commands.add_parser("preprocess", help=about, description=about))
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (CheckpointError, ValueError, OSError) as error:
        sys.exit(f"lightning-megatron: {error}")


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
