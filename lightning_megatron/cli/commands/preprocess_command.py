"""``lightning-megatron preprocess``: text as Megatron's indexed data."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_megatron.cli.commands.words import words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the arguments."""
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
        type=words,
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
        type=words,
        default=".txt,.md,.py,.jsonl",
        help="endings of the files to take from folders (default: %(default)s)",
    )


def run(given: argparse.Namespace) -> None:
    """Run the command."""
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
