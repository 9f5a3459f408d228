"""``lightning-megatron show``: which part of the model each rank holds, and on which node."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_megatron.distributed.layout import ParallelLayout
    from lightning_megatron.models.model_config import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the arguments."""
    parser.add_argument("layout", help="parallel sizes, such as tp=8,pp=4,world=64")
    parser.add_argument(
        "--ranks-per-node", type=int, help="devices of each machine (default: 8, or all ranks if there are fewer)"
    )
    parser.add_argument(
        "--model",
        help="also show the memory that a rank takes to train this model: a directory with transformers' config.json,"
        " or a name on the Hugging Face hub, of which no weights are fetched",
    )
    parser.add_argument("--micro-batch-size", type=int, default=1, help="with --model: rows (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, help="with --model: tokens of a row (default: the most it can have)")
    parser.add_argument(
        "--precision", default="bf16-mixed", help="with --model: as the Trainer's (default: %(default)s)"
    )
    parser.add_argument("--recompute", choices=("selective", "full"), help="with --model: as the strategy's")
    parser.add_argument(
        "--layers-per-stage",
        help="as the strategy's: layers of each pipeline stage, such as 7,8,8,7; with --model also auto",
    )
    parser.add_argument("--out", help="also draw the grid into this .png, .svg or .pdf file")


def _memory(config: ModelConfig, layout: ParallelLayout, given: argparse.Namespace) -> str:
    """The table of the memory of a rank of each pipeline stage."""
    lengths = None if given.seq_length is None else (given.seq_length,) * len(config.lengths)
    settings = {"micro_batch_size": given.micro_batch_size, "precision": given.precision, "recompute": given.recompute}
    return str(layout.memory(config, lengths=lengths, **settings))


def _cut(layout: ParallelLayout, text: str) -> ParallelLayout:
    """The layout with the layers of each stage that the command line says."""
    numbers = text.strip("[]").replace(" ", "").split(",")
    return replace(layout, layers_per_stage=list(map(int, numbers)) if all(map(str.isdigit, numbers)) else text)


def _of_length(config: ModelConfig, length: int | None) -> ModelConfig:
    """The configuration for rows of that length, which "auto" cuts for."""
    if length is None:
        return config
    given: dict[str, Any] = {each: length for each in ("seq_length", "decoder_seq_length") if hasattr(config, each)}
    return replace(config, **given)


def run(given: argparse.Namespace) -> None:
    """Run the command."""
    from lightning_megatron.cli.rank_grid import RankGrid

    grid, config = RankGrid.parse(given.layout, given.ranks_per_node), None
    layout = _cut(grid.layout, given.layers_per_stage) if given.layers_per_stage else grid.layout
    if given.model:
        from lightning_megatron.hf.weight_source import DescribedModel
        from lightning_megatron.models.auto import config_of

        config = config_of(DescribedModel(given.model, None))
        layout = _of_length(config, given.seq_length).complete_layout(layout, given.recompute)
    elif layout.layers_per_stage == "auto":
        raise layout.error("'auto' reads how long layers take from a model. Name it with --model.")
    grid = replace(grid, layout=layout)
    print(grid.text())
    for warning in grid.warnings():
        print(f"\nWarning: {warning}")
    if config is not None:
        print(f"\n{_memory(config, layout, given)}")
    if given.out:
        print(f"\n{grid.draw(given.out)}")
