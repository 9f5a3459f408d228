"""A signal that ends the run (SIGTERM, or SLURM's before a requeue): end the step, save, stop, on all ranks together.

Lightning 2.6's own handlers start collectives from wherever the signal finds a rank, in the middle of a pipeline
schedule too, which then waits for ever. Here the handler only notes the signal.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_megatron.distributed import lightning_private

_EXIT_CODE = 128 + signal.SIGTERM  # what a process that SIGTERM ended reports; torchrun then restarts the ranks


class Preemption:
    """Listens for signals during one fit, and acts after each batch.

    Args:
        trainer: Whose signals and checkpoints.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._signal = 0
        self._requeue: int | None = None
        environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = int(environment.requeue_signal or signal.SIGUSR1)

    def listen(self) -> None:
        """Take the place of Lightning's handlers, which it puts back itself when the fit ends."""
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGTERM, *([self._requeue] if self._requeue else [])}:
                signal.signal(number, self._note)

    def act(self) -> None:
        """After a batch, where all ranks are: save and stop if any of them has been told to.

        Raises:
            SIGTERMException: On every rank, once the checkpoint is whole.
        """
        trainer = self._trainer
        if not lightning_private.ends_accumulation(trainer):
            return
        if not trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            return
        requeue = self._requeue is not None and trainer.strategy.reduce_boolean_decision(
            self._signal == self._requeue, all=False
        )
        with trainer.strategy.checkpointer.synchronous():  # type: ignore[attr-defined]
            if requeue:
                lightning_private.save_and_requeue(trainer, self._requeue)  # type: ignore[arg-type]
            elif (path := last_path(trainer)) is not None:
                rank_zero_info(f"Told to end: saving {path}.")
                trainer.save_checkpoint(path)
            else:
                rank_zero_warn("Told to end. Nothing is saved: there is no ModelCheckpoint to say where.")
        lightning_private.note_sigterm(trainer)
        raise SIGTERMException(_EXIT_CODE)

    def end_advance(self, data_fetcher: Any) -> None:
        """In place of the epoch loop's ``on_advance_end``: save and stop before it where a signal says so."""
        self.act()
        loop = self._trainer.fit_loop.epoch_loop
        type(loop).on_advance_end(loop, data_fetcher)

    def _note(self, number: int, frame: Any) -> None:
        if not self._signal:
            launcher = self._trainer.strategy.launcher
            if launcher is not None and hasattr(launcher, "kill"):
                launcher.kill(signal.Signals(number))  # hands it on to the ranks that this process started
        self._signal = number
        before = lightning_private.handler_before(self._trainer, number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)


def last_path(trainer: pl.Trainer) -> Path | None:
    """Where ``ckpt_path="last"`` looks; nowhere without a ModelCheckpoint."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            path = Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            callback.last_model_path = str(path)
            return path
    return None
