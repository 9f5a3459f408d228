"""Predictions of several replicas, joined into the data's order."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils._pytree import tree_flatten, tree_map

from lightning_megatron import groups


def join_replicas(trainer: pl.Trainer) -> None:
    """Give every rank the predictions of all replicas, batch by batch as one process would have made them.

    Predictions of a loader whose samples are not known by number (an iterable set), or which do not have one row per
    sample, stay as each replica made them.
    """
    loop = trainer.predict_loop
    if not loop.return_predictions or groups.data_parallel().size() == 1:
        return
    for loader, made in zip(loop._combined_loader.flattened, loop._predictions, strict=True):  # type: ignore[union-attr]
        seen = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", [])[: len(made)]
        mine = list(zip(seen, made, strict=False)) if len(seen) == len(made) else None
        if mine is not None and not all(_row_by_row(prediction, len(numbers)) for numbers, prediction in mine):
            mine = None
        every = groups.gather_from_replicas(mine)
        batches = [batch for replica in every if replica is not None for batch in replica]
        alike = all(replica and [n for n, _ in replica] == [n for n, _ in every[0] or []] for replica in every)
        shapes = {tuple(x.shape[1:] for x in tree_flatten(made)[0]) for _, made in batches}
        if len(shapes) == 1 and None not in every and not alike:  # alike: each replica has read the whole set
            made[:] = _in_order(batches)


def _row_by_row(prediction: Any, rows: int) -> bool:
    leaves = tree_flatten(prediction)[0]
    return bool(leaves) and all(isinstance(x, torch.Tensor) and x.dim() and x.size(0) == rows for x in leaves)


def _in_order(batches: list[tuple[list[int], Any]]) -> list[Any]:
    """Rows sorted by their samples' numbers, in batches of the first batch's size."""
    size = len(batches[0][0])
    rows = sorted(
        ((number, batch, row) for batch, (numbers, _) in enumerate(batches) for row, number in enumerate(numbers)),
        key=lambda place: place[0],
    )
    joined = []
    for start in range(0, len(rows), size):
        chosen = [tree_map(lambda x, r=row: x[r], batches[batch][1]) for _, batch, row in rows[start : start + size]]
        joined.append(tree_map(lambda *xs: torch.stack(xs), *chosen))
    return joined
