"""``lightning-megatron show``: which part of the model each rank holds, and on which node."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the arguments."""
    parser.add_argument("layout", help="parallel sizes, such as tp=8,pp=4,world=64")
    parser.add_argument(
        "--ranks-per-node", type=int, help="devices of each machine (default: 8, or all ranks if there are fewer)"
    )
    parser.add_argument("--out", help="also draw the grid into this .png, .svg or .pdf file")


def run(given: argparse.Namespace) -> None:
    """Run the command."""
    from lightning_megatron.cli.rank_grid import RankGrid

    grid = RankGrid.parse(given.layout, given.ranks_per_node)
    print(grid.text())
    for warning in grid.warnings():
        print(f"\nWarning: {warning}")
    if given.out:
        print(f"\n{grid.draw(given.out)}")
