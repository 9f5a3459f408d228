"""Joins the predictions of several replicas in the order of the data."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_megatron.distributed import collectives, lightning_private, process_groups
from lightning_megatron.strategy.dataloading.evaluation_sampler import EvaluationSampler, sampler_of
from lightning_megatron.training.batch_rows import form_of_rows, join_rows, one_row


def join_replicas(trainer: pl.Trainer) -> None:
    """Give every rank the predictions of all replicas, batch by batch as one process would have made them.

    Predictions stay as each replica made them where samples have no index (an iterable dataset), and where a prediction
    does not have one row for each sample.
    """
    loop = trainer.predict_loop
    if not loop.return_predictions or process_groups.replicas().size() == 1:
        return
    combined = lightning_private.combined_loader(loop)
    assert combined is not None
    for loader, made in zip(combined.flattened, lightning_private.predictions(trainer), strict=True):
        sampler = sampler_of(loader)
        if getattr(sampler, "is_repeated", False):  # another replica has predicted this sample
            made.clear()
        if isinstance(sampler, EvaluationSampler) and loader.batch_sampler is None:  # each sample is a batch
            places = range(sampler.rank, sampler.total_size, sampler.num_replicas)
            every: Any = collectives.gather_from_replicas(list(zip(places, made, strict=False)))
            ordered = sorted((pair for replica in every for pair in replica), key=lambda pair: pair[0])
            made[:] = [prediction for _, prediction in ordered]
        else:
            _join_rows_of_replicas(loader, made)


def _join_rows_of_replicas(loader: Any, made: list[Any]) -> None:
    seen = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", None)
    mine = None if seen is None else list(zip(seen, made, strict=False))
    forms = {form_of_rows(prediction, len(numbers)) for numbers, prediction in mine or []}
    every = collectives.gather_from_replicas((mine, forms))
    batches = [batch for replica, _ in every for batch in replica or []]
    form = set().union(*(found for _, found in every))
    read = [[numbers for numbers, _ in replica or []] for replica, _ in every]
    shares = len(read[0]) == 0 or any(numbers != read[0] for numbers in read)  # or each has read the whole dataset
    if batches and shares and len(form) == 1 and None not in form and all(r is not None for r, _ in every):
        made[:] = _in_order(batches)


def _in_order(batches: list[tuple[list[int], Any]]) -> list[Any]:
    """Sort rows by the indices of their samples, and cut them into batches of the first batch's size."""
    size = len(batches[0][0])
    rows = sorted(
        ((number, batch, row) for batch, (numbers, _) in enumerate(batches) for row, number in enumerate(numbers)),
        key=lambda place: place[0],
    )
    joined = []
    for start in range(0, len(rows), size):
        chosen = [one_row(batches[b][1], row, len(batches[b][0])) for _, b, row in rows[start : start + size]]
        joined.append(join_rows(chosen, [1] * len(chosen)))
    return joined
