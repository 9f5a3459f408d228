"""Reads the first batch of each loader of a run, and shows what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_megatron.cli.check.result import LoaderCheck
from lightning_megatron.distributed import lightning_private
from lightning_megatron.models.megatron_module import IGNORED_LABEL
from lightning_megatron.training.batch_rows import count_rows

_TOKENS = ("input_ids", "tokens", "text", "decoder_input_ids", "labels")
_SHOWN = 48  # tokens of a row


def loaders_of(trainer: pl.Trainer, source: Any) -> Iterator[tuple[str, Any]]:
    """The loaders of a fit as replica 0 reads them: that of training, then those of validation.

    Args:
        trainer: The Trainer of the run.
        source: The data module, or the module where there is none; its data is prepared and set up.
    """
    for name, mode in (("train", RunningStage.TRAINING), ("val", RunningStage.VALIDATING)):
        hook = f"{name}_dataloader"
        if not is_overridden(hook, source):
            continue
        given = getattr(source, hook)()
        trains = mode == RunningStage.TRAINING
        combined = CombinedLoader(given, "max_size_cycle" if trains else "sequential")
        combined.flattened = [
            lightning_private.prepare_loader(trainer, loader, trains, mode) for loader in combined.flattened
        ]
        every = combined.flattened
        if trains and every:
            yield name, every[0] if combined.iterables is every[0] else combined
        elif not trains:
            yield from ((f"{name} {number}" if len(every) > 1 else name, one) for number, one in enumerate(every))


def first_batch(name: str, loader: Any, tokenizer: Any) -> tuple[Any, LoaderCheck]:
    """The first batch of a loader, and what is in it.

    Args:
        name: Name of the loader, for people.
        loader: The loader.
        tokenizer: What turns ids into text, or None.
    """
    batch = next(iter(loader))
    batch = batch[0] if isinstance(loader, CombinedLoader) else batch
    found = LoaderCheck(name, batches=sized_len(loader), rows=count_rows(batch))
    found.last_rows = _rows_of_last(loader, found.rows)
    entries = batch if isinstance(batch, Mapping) else {"batch": batch}
    found.tensors = {str(key): _described(value) for key, value in entries.items() if value is not None}
    if tokenizer is not None:
        found.texts = {key: text for key in _TOKENS if (text := _decoded(tokenizer, entries.get(key))) is not None}
        if found.texts.get("labels") in (found.texts.get("input_ids"), found.texts.get("tokens")):
            found.texts.pop("labels", None)  # all of it is learnt
    return batch, found


def _rows_of_last(loader: Any, rows: int | None) -> int | None:
    """The rows of an epoch's last batch, where they are fewer than the others'."""
    if not isinstance(loader, DataLoader) or loader.batch_size is None or loader.drop_last or rows is None:
        return None
    samples = sized_len(loader.sampler)
    return samples % loader.batch_size or None if samples is not None and samples > loader.batch_size else None


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _decoded(tokenizer: Any, ids: Any) -> str | None:
    """The beginning of the first row's tokens as text; None where they are none."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    row = ids[0]
    row = row[row != IGNORED_LABEL]
    try:
        text = str(tokenizer.decode(row[:_SHOWN].tolist()))
    except Exception as error:  # ids that are not the tokenizer's; check_batch says which
        return f"(the tokenizer cannot decode it: {type(error).__name__})"
    return text + ("…" if len(row) > _SHOWN else "")
