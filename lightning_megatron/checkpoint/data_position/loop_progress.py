"""Reads Lightning's loop counts, and corrects them in a checkpoint so that a run resumes at the right batch.

Lightning 2.6 closes an epoch that ``max_steps`` cuts short, so that a resume would continue in the next epoch's order.
It also counts batches in the middle of an accumulation window, whose gradients no checkpoint holds. Here the epoch
stays open, and the window is run again.
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
        epoch: The epoch to continue in.
        batches: Batches of that epoch whose optimizer steps are done.
        redo: Batches after those, of an unfinished accumulation window, which are run again.
        begun: Whether the iterators of that epoch exist.
    """

    epoch: int
    batches: int
    redo: int
    begun: bool


def position(trainer: pl.Trainer) -> Position:
    """The position of ``trainer`` in its training data."""
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
    """Number of batches of the present epoch that have been trained on."""
    counts: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(counts.processed)


def correct_counts(loops: dict[str, Any], where: Position) -> None:
    """Correct the saved counts of Lightning's fit loop, in place."""
    epochs, batches = loops["fit_loop"]["epoch_progress"], loops["fit_loop"]["epoch_loop.batch_progress"]
    inside = where.batches > 0 or where.redo > 0
    if where.epoch == epochs["current"]["started"] > epochs["current"]["processed"]:
        # Saved by a hook behind the epoch's last batch, before Lightning counts it on the loggers' x-axis.
        loops["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    for counts in (epochs["total"], epochs["current"]):
        if inside and counts["processed"] == counts["started"]:  # closed, although batches are left
            counts["completed"] = min(counts["completed"], counts["processed"] - 1)
            counts["processed"] -= 1
        elif not inside:
            counts["processed"] = counts["completed"] = counts["ready"] = counts["started"]
    for counts in (batches["total"], batches["current"]):
        for name in _COUNTS:
            counts[name] = max(counts[name] - where.redo, 0)
    if where.batches == 0:  # the beginning of an epoch, also if its first window is run again
        batches["total"] = dict.fromkeys(_COUNTS, batches["total"]["processed"])
        batches["current"] = dict.fromkeys(_COUNTS, 0)
        batches["is_last_batch"] = False


def set_batches(trainer: pl.Trainer, batches: int) -> None:
    """Make the present epoch continue after ``batches``."""
    counts: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    counts.ready = counts.started = counts.processed = counts.completed = batches
