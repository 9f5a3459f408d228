"""Makes Lightning's rich progress bar name an epoch alone where their number is not limited."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


def bars_without_last_epoch(trainer: pl.Trainer) -> list[RichProgressBar]:
    """The bars that would show -2 as the last epoch: with ``max_steps`` alone, ``max_epochs`` is -1."""
    if trainer.max_epochs != -1:
        return []
    return [callback for callback in trainer.callbacks if isinstance(callback, RichProgressBar)]  # type: ignore[attr-defined]


def train_description(bar: RichProgressBar, epoch: int) -> str:
    """The name of an epoch's bar; it stands in for the bar's own method. As wide as the name of the bar below it."""
    return f"Epoch {epoch}".ljust(len(bar.validation_description))
