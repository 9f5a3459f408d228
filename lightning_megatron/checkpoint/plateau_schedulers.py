"""Schedulers that wait for a metric (ReduceLROnPlateau) across a resume.

Lightning updates them behind the hooks that most checkpoints are saved in, and a resumed run has no metric to make up
for it. So a checkpoint keeps the updates that were due when it was saved, with their metrics, and the resumed run makes
them before its first batch.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_megatron.distributed import lightning_private

Record = dict[str, Any]


class PlateauSchedulers:
    """The updates that are due in one fit."""

    def __init__(self) -> None:
        self._due: set[str] = set()
        self._validated = -1  # batches that had been trained when the last validation began
        self._loaded: list[Record] = []

    def note_update(self, interval: str, of_plateaus: bool) -> None:
        """Schedulers of an interval are updated: first those that wait for no metric, then the others."""
        (self._due.discard if of_plateaus else self._due.add)(interval)

    def note_validation(self, trainer: pl.Trainer) -> None:
        """A validation within the fit begins."""
        self._validated = _trained(trainer)

    def record(self, trainer: pl.Trainer) -> list[Record]:
        """What a checkpoint keeps; called on all ranks."""
        found: list[Record] = []
        loop: Any = trainer.fit_loop
        for number, config in enumerate(trainer.lr_scheduler_configs):
            if not config.reduce_on_plateau or config.monitor is None:
                continue
            counted = loop.epoch_loop.batch_idx if config.interval == "step" else loop.epoch_progress.current.started
            due = config.interval in self._due and (counted + 1) % config.frequency == 0
            value: Any = trainer.callback_metrics.get(config.monitor)
            if due and self._waits_for_validation(trainer, config.monitor):
                value = None
            value = value.detach().cpu() if isinstance(value, torch.Tensor) else value
            found.append({"scheduler": number, "monitor": config.monitor, "value": value, "due": due})
        return found

    def load(self, records: list[Record]) -> None:
        """Make up in this run for what was due."""
        self._due, self._loaded = set(), records

    def begin(self, trainer: pl.Trainer) -> None:
        """Make the updates that were due, before the first batch."""
        configs, records = trainer.lr_scheduler_configs, self._loaded
        self._loaded = []
        for record in records:
            number, value = record["scheduler"], record["value"]
            if number >= len(configs) or not configs[number].reduce_on_plateau:
                continue
            if value is not None:
                trainer.callback_metrics.setdefault(record["monitor"], value)
            if record["due"] and value is None and configs[number].strict:
                rank_zero_warn(
                    f"The checkpoint was saved before {record['monitor']!r} was known, for which ReduceLROnPlateau"
                    " waits: one update is left out."
                )
            elif record["due"] and value is not None:
                progress = trainer.fit_loop.epoch_loop.scheduler_progress
                progress.increment_ready()
                lightning_private.call_module_hook(trainer, "lr_scheduler_step", configs[number].scheduler, value)
                progress.increment_completed()

    def _waits_for_validation(self, trainer: pl.Trainer, monitor: str) -> bool:
        """Whether a validation comes between the save and the update, and the metric is not of training."""
        comes = lightning_private.validation_is_due(trainer) and self._validated != _trained(trainer)
        return comes and not lightning_private.logs_every_step(trainer, monitor)


def _trained(trainer: pl.Trainer) -> int:
    counts: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(counts.processed)
