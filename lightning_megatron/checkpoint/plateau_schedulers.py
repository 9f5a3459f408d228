"""Keeps updates of ReduceLROnPlateau from being lost when a run is resumed.

Lightning updates such schedulers after the hooks that most checkpoints are saved in, and a resumed run no longer has
the metric. So a checkpoint holds the updates that were due when it was saved, with their metrics, and the resumed run
makes them before its first batch.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_megatron.distributed import lightning_private

Record = dict[str, Any]


class PlateauSchedulers:
    """The updates of ReduceLROnPlateau that are due in one fit."""

    def __init__(self) -> None:
        self._due: set[str] = set()
        self._validated = -1  # number of batches trained before the last validation
        self._loaded: list[Record] = []

    def note_update(self, interval: str, of_plateaus: bool) -> None:
        """Note that schedulers of an interval are updated: first the others, then those that wait for a metric."""
        (self._due.discard if of_plateaus else self._due.add)(interval)

    def note_validation(self, trainer: pl.Trainer) -> None:
        """Note that a validation within the fit begins."""
        self._validated = _trained(trainer)

    def record(self, trainer: pl.Trainer) -> list[Record]:
        """Return what a checkpoint stores; all ranks call this."""
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
        """Have this run make the updates that were due."""
        self._due, self._loaded = set(), records

    def begin(self, trainer: pl.Trainer) -> None:
        """Make the updates that were due; called before the first batch."""
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
                    f"The checkpoint was saved before {record['monitor']!r} was known, which ReduceLROnPlateau waits"
                    " for: one update is skipped."
                )
            elif record["due"] and value is not None:
                progress = trainer.fit_loop.epoch_loop.scheduler_progress
                progress.increment_ready()
                lightning_private.call_module_hook(trainer, "lr_scheduler_step", configs[number].scheduler, value)
                progress.increment_completed()

    def _waits_for_validation(self, trainer: pl.Trainer, monitor: str) -> bool:
        """Whether a validation comes between the save and the update, and the metric is no training metric."""
        comes = lightning_private.validation_is_due(trainer) and self._validated != _trained(trainer)
        return comes and not lightning_private.logs_every_step(trainer, monitor)


def _trained(trainer: pl.Trainer) -> int:
    counts: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(counts.processed)
