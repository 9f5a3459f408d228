"""Brings the results of a run back to the process that launched it: metrics, callbacks, progress and weights."""

from __future__ import annotations

import io
import pickle
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from lightning_utilities.core.apply_func import apply_to_collection
from typing_extensions import override

from lightning_megatron.checkpoint import manifest
from lightning_megatron.distributed import lightning_private

_METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
_KEPT = "_kept_checkpoint"


class KeptCheckpoint:
    """The checkpoint of a fit in a temporary folder, which is deleted when the launching process drops this object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lightning_megatron_")
        self.path = Path(self._folder.name) / "checkpoint"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # a rank only reads the folder, and never deletes it

    def copy_to(self, path: Path, asked_for: dict[str, Any]) -> None:
        """Copy the checkpoint, as ``trainer.save_checkpoint`` asks in the launching process.

        Args:
            path: The path of the copy; a checkpoint that is there is replaced.
            asked_for: The checkpoint that Lightning has collected in this process. Only its keys are looked at.

        Raises:
            ValueError: Only the weights were asked for.
        """
        if "optimizer_states" not in asked_for:
            raise ValueError(
                "trainer.save_checkpoint(weights_only=True) after a run with launch='forkserver': the ranks left a"
                " checkpoint with optimizer state. Leave weights_only out."
            )
        unfinished = path.with_name(path.name + ".unfinished")
        manifest.remove(unfinished)
        copy = shutil.copytree if self.path.is_dir() else shutil.copyfile
        copy(self.path, unfinished)
        manifest.remove(path)
        unfinished.rename(path)


class RestoreWeights(pl.Callback):
    """Restores the weights of an earlier run on each rank, once the model is built."""

    def __init__(self, kept: KeptCheckpoint) -> None:
        self._kept = kept

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # in a fit, on_fit_start has loaded them
            self._load(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load(trainer)

    def _load(self, trainer: pl.Trainer) -> None:
        if trainer.ckpt_path is None:  # otherwise the user names the checkpoint to load
            checkpoint = trainer.strategy.load_checkpoint(self._kept.path, weights_only=False)
            trainer.strategy.load_model_state_dict(checkpoint, strict=True)
            trainer.strategy.checkpointer.resumption.reset()  # type: ignore[attr-defined]


@dataclass
class RunResult:
    """The results of a run, collected on rank 0.

    Args:
        results: What the Trainer's method returned.
        state: The Trainer's state.
        metrics: The Trainer's three dictionaries of metrics, by attribute name.
        progress: The state of the fit loop.
        objects: The callbacks and loggers, in order: each pickled, or its state dict, or None if neither works.
        weights: The parameters and buffers that the caller's module has too, by name.
        is_whole: Whether ``weights`` are all parameters and buffers of the model.
    """

    results: Any
    state: TrainerState
    metrics: dict[str, dict[str, Any]]
    progress: dict[str, Any]
    objects: list[bytes | dict[str, Any] | None]
    weights: dict[str, torch.Tensor]
    is_whole: bool

    def give_to(self, trainer: pl.Trainer, kept: KeptCheckpoint | None) -> None:
        """Give the caller's Trainer, callbacks, loggers and module the state that rank 0's have.

        Args:
            trainer: The caller's Trainer.
            kept: The checkpoint that the run left, if it was a fit.
        """
        trainer.state = self.state
        for name, values in self.metrics.items():
            getattr(trainer, name).clear()
            getattr(trainer, name).update(values)
        _set_progress(trainer.fit_loop, self.progress)
        for mine, theirs in zip(_objects(trainer), self.objects, strict=True):
            if isinstance(theirs, bytes):
                vars(mine).update(vars(_Unpickler(io.BytesIO(theirs), trainer).load()))
            elif theirs is not None:
                mine.load_state_dict(theirs)
        module = trainer.lightning_module
        if kept is not None:
            module.load_state_dict(self.weights, strict=False)
            module.__dict__[_KEPT] = None if self.is_whole else kept


@dataclass
class Baseline:
    """What a rank received from the caller, noted before the run, which may add to it.

    Args:
        names: The names of the module's parameters and buffers.
        objects: The Trainer's callbacks and loggers.
    """

    names: list[str]
    objects: list[Any]

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Baseline:
        """Note what ``trainer`` has before the run, and have the weights of an earlier run restored."""
        baseline = cls(list(trainer.lightning_module.state_dict()), _objects(trainer))
        kept = trainer.lightning_module.__dict__.get(_KEPT)
        if kept is not None:
            trainer.callbacks.insert(0, RestoreWeights(kept))  # type: ignore[attr-defined]
        return baseline

    def collect(self, trainer: pl.Trainer, results: Any) -> RunResult:
        """Collect the results after the run, on rank 0."""
        state = _on_host(trainer.lightning_module.state_dict())
        weights = {name: state[name] for name in self.names if name in state}
        return RunResult(
            results=_on_host(results),
            state=trainer.state,
            metrics={name: _on_host(dict(getattr(trainer, name))) for name in _METRICS},
            progress=trainer.fit_loop.state_dict(),
            objects=[_pickled(item, trainer) for item in self.objects],
            weights=weights,
            is_whole=len(weights) == len(state),
        )


def _objects(trainer: pl.Trainer) -> list[Any]:
    return [*trainer.callbacks, *trainer.loggers]  # type: ignore[attr-defined]


def _on_host(data: Any) -> Any:
    return apply_to_collection(data, torch.Tensor, lambda tensor: tensor.detach().cpu())


def _set_progress(loop: Any, state: dict[str, Any]) -> None:
    """Set a loop's progress to ``state``, as if it had run that far, and not as if it were to resume there."""
    loop.load_state_dict(state)
    lightning_private.forget_restart(loop)


def _pickled(item: Any, trainer: pl.Trainer) -> bytes | dict[str, Any] | None:
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, trainer).dump(item)
    except Exception:  # it may hold a terminal (a progress bar) or a connection (a logger)
        return item.state_dict() if isinstance(item, pl.Callback) else None
    return buffer.getvalue()


def _known(trainer: pl.Trainer) -> dict[str, Any]:
    """Objects that callbacks may refer to and that the caller has too: references to them are sent by name."""
    return {
        "trainer": trainer,
        "module": trainer.lightning_module,
        "datamodule": getattr(trainer, "datamodule", None),
        "strategy": trainer.strategy,
    }


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, trainer: pl.Trainer) -> None:
        super().__init__(file)
        self._names = {id(value): name for name, value in _known(trainer).items() if value is not None}

    def persistent_id(self, value: Any) -> str | None:
        return self._names.get(id(value))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, trainer: pl.Trainer) -> None:
        super().__init__(file)
        self._values = _known(trainer)

    @override
    def persistent_load(self, name: str) -> Any:
        return self._values[name]
