"""Keeps the records of ModelCheckpoint right when saves are asynchronous or fail.

ModelCheckpoint assumes that a checkpoint exists when the save returns. A checkpoint that is being written in the
background occupies its name already, and is linked to once it is complete. A checkpoint that could not be written
(``on_save_error="warn"``) is removed from the records again, and the one that it was to replace is put back.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_megatron.checkpoint.paths import check_folder, local_path


def checkpoint_callbacks(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """The ModelCheckpoint callbacks of a Trainer."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def check_folders(trainer: pl.Trainer) -> None:
    """Refuse folders that no checkpoint can be saved to, before a step is run.

    Raises:
        MisconfigurationException: A folder cannot hold checkpoints; the text names it.
    """
    for callback in checkpoint_callbacks(trainer):
        check_folder(callback.dirpath or trainer.default_root_dir)


class CallbackRecords:
    """The checkpoints that the callbacks have recorded, corrected when a save fails and the run goes on."""

    def __init__(self) -> None:
        self._callbacks: list[ModelCheckpoint] = []
        self._scores: dict[str, torch.Tensor] = {}

    def remember(self, trainer: pl.Trainer) -> None:
        """Remember the scores: a callback drops that of a checkpoint before the checkpoint's successor is saved."""
        self._callbacks = checkpoint_callbacks(trainer)
        for callback in self._callbacks:
            self._scores.update(callback.best_k_models)

    def correct(self, lost: Iterable[Path], kept: Iterable[Path], saved: Iterable[Path]) -> None:
        """Correct the callbacks after a failed save.

        Args:
            lost: The checkpoints that were not saved.
            kept: The checkpoints that were to be removed after those, and are kept.
            saved: The checkpoints that this run has saved, in order.
        """
        gone = [path for path in lost if not path.exists()]  # an older checkpoint may have the name
        for callback in self._callbacks:
            for name in [name for name in callback.best_k_models if local_path(name) in gone]:
                del callback.best_k_models[name]
            names = {local_path(name): name for name in self._scores if local_path(name).parent == _folder(callback)}
            for path in kept:
                has_room = callback.save_top_k == -1 or len(callback.best_k_models) < callback.save_top_k
                if path in names and has_room:
                    callback.best_k_models[names[path]] = self._scores[names[path]]
            if callback.monitor is not None:
                _rank(callback)
            elif callback.best_model_path and local_path(callback.best_model_path) in gone:
                others = [p for p in (*saved, *kept) if p.parent == _folder(callback) and p.exists()]
                callback.best_model_path = str(others[-1]) if others else ""
            if callback.last_model_path and local_path(callback.last_model_path) in gone:
                callback.last_model_path = ""

    def corrected_states(self, state: dict[str, Any]) -> dict[str, Any]:
        """The callbacks' states for a checkpoint, collected again after ``correct``."""
        now = {c.state_key: c.state_dict() for c in self._callbacks if c.state_key in state}
        return {**state, **now}


def _rank(callback: ModelCheckpoint) -> None:
    """Set a callback's best and worst checkpoint from its scores, as its ``_update_best_and_save`` does."""
    scores = callback.best_k_models
    best, worst = (min, max) if callback.mode == "min" else (max, min)
    callback.best_model_path = best(scores, key=scores.__getitem__) if scores else ""
    callback.best_model_score = scores.get(callback.best_model_path)
    callback.kth_best_model_path = worst(scores, key=scores.__getitem__) if scores else ""
    if scores:
        callback.kth_value = scores[callback.kth_best_model_path]


def _folder(callback: ModelCheckpoint) -> Path | None:
    return local_path(callback.dirpath) if callback.dirpath else None


def file_exists(filepath: Any, trainer: pl.Trainer) -> bool:
    """Replace ``ModelCheckpoint.file_exists``: a name is in use from the start of a save."""
    if trainer.strategy.checkpointer.saves.is_being_saved(local_path(filepath)):  # type: ignore[attr-defined]
        return True
    here = trainer.is_global_zero and get_filesystem(filepath).exists(os.fspath(filepath))
    return trainer.strategy.reduce_boolean_decision(here, all=False)


def link(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
    """Replace how ModelCheckpoint makes its link: the checkpoint may not be complete yet."""
    trainer.strategy.checkpointer.saves.link(local_path(linkpath), local_path(filepath))  # type: ignore[attr-defined]
