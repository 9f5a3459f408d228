"""Where in its data a run is: Lightning's counts put right for a resume, in batches and in samples.

Lightning 2.6 closes an epoch that ``max_steps`` cuts short, so that a resume would go on in the next epoch's order;
and it counts batches in the middle of an accumulation window whose gradients no checkpoint holds. Here the epoch stays
open, and the window begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from lightning_megatron.distributed import lightning_private

_COUNTS = ("ready", "started", "processed", "completed")


@dataclass(frozen=True)
class Position:
    """What a run has consumed.

    Args:
        epoch: The epoch to go on in.
        batches: Batches of that epoch whose steps are in the weights.
        redo: Batches after those, of an unfinished accumulation window: they are run again.
        begun: Whether the iterators of that epoch have been made.
    """

    epoch: int
    batches: int
    redo: int
    begun: bool


def position(trainer: pl.Trainer) -> Position:
    """Where ``trainer`` is in its training data."""
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    epoch = max(epochs.started - 1, 0)
    done = processed(trainer)
    if loop.epoch_loop.batch_progress.is_last_batch or done >= loop.max_batches:
        return Position(epoch + 1, 0, 0, begun=False)
    redo = done % trainer.accumulate_grad_batches
    begun = lightning_private.combined_loader(loop) is not None
    return Position(epoch, done - redo, redo, begun)


def processed(trainer: pl.Trainer) -> int:
    """Batches of the running epoch that have been trained on."""
    counts: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(counts.processed)


def correct_counts(loops: dict[str, Any], where: Position) -> None:
    """Correct the saved counts of Lightning's fit loop, in place."""
    epochs, batches = loops["fit_loop"]["epoch_progress"], loops["fit_loop"]["epoch_loop.batch_progress"]
    inside = where.batches > 0 or where.redo > 0
    for counts in (epochs["total"], epochs["current"]):
        if inside and counts["processed"] == counts["started"]:  # closed, though not all of its batches have run
            counts["completed"] = min(counts["completed"], counts["processed"] - 1)
            counts["processed"] -= 1
        elif not inside:
            counts["processed"] = counts["completed"] = counts["ready"] = counts["started"]
    for counts in (batches["total"], batches["current"]):
        for name in _COUNTS:
            counts[name] = max(counts[name] - where.redo, 0)
    if where.batches == 0:  # an epoch's beginning, also where its first window is run again
        batches["total"] = dict.fromkeys(_COUNTS, batches["total"]["processed"])
        batches["current"] = dict.fromkeys(_COUNTS, 0)
        batches["is_last_batch"] = False


def set_batches(trainer: pl.Trainer, batches: int) -> None:
    """Have the running epoch go on after ``batches``."""
    counts: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    counts.ready = counts.started = counts.processed = counts.completed = batches
