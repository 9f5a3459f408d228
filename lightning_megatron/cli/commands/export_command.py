"""``lightning-megatron export``: a checkpoint as one file, or as a directory that transformers or peft loads."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the arguments."""
    parser.add_argument("checkpoint", help="the checkpoint's directory")
    parser.add_argument(
        "out", help="a directory for transformers; a .safetensors file; or a .ckpt file for a plain LightningModule"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="write the low-rank updates alone, in a directory that peft loads"
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


def run(given: argparse.Namespace) -> None:
    """Run the command."""
    if given.adapter:
        from lightning_megatron.models.export_checkpoint import export_adapter

        print(export_adapter(given.checkpoint, given.out, family=given.family))
        return
    from lightning_megatron.checkpoint.consolidate import SUFFIXES, export

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
