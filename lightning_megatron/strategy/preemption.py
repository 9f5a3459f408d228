"""Answers a signal that ends the run (SIGTERM, or SLURM's before a requeue): all ranks end the step, save and stop.

Lightning 2.6's own handlers start collectives wherever the signal interrupts a rank. In the middle of a pipeline
schedule, the ranks then wait for ever. Here the handler only notes the signal.
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

_EXIT_CODE = 128 + signal.SIGTERM  # the exit code of a process that SIGTERM ended; torchrun restarts the ranks on it


class Preemption:
    """Listens for signals during one fit, and acts after each batch.

    Args:
        trainer: The Trainer that is stopped, and whose checkpoints are saved.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._signal = 0
        self._requeue: int | None = None
        environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = int(environment.requeue_signal or signal.SIGUSR1)

    def listen(self) -> None:
        """Replace Lightning's signal handlers; Lightning restores the original ones when the fit ends."""
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGTERM, *([self._requeue] if self._requeue else [])}:
                signal.signal(number, self._note)

    def act(self) -> None:
        """Save and stop if any rank has had a signal; all ranks call this after each batch.

        Raises:
            SIGTERMException: A rank has had a signal. Every rank raises it once the checkpoint is complete.
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
                rank_zero_info(f"A signal ends the run: saving {path}.")
                trainer.save_checkpoint(path)
            else:
                rank_zero_warn("A signal ends the run, and nothing is saved: there is no ModelCheckpoint to save to.")
        lightning_private.note_sigterm(trainer)
        raise SIGTERMException(_EXIT_CODE)

    def end_advance(self, data_fetcher: Any) -> None:
        """Stand in for the epoch loop's ``on_advance_end``: first save and stop if there was a signal."""
        self.act()
        loop = self._trainer.fit_loop.epoch_loop
        type(loop).on_advance_end(loop, data_fetcher)

    def _note(self, number: int, frame: Any) -> None:
        if not self._signal:
            launcher = self._trainer.strategy.launcher
            if launcher is not None and hasattr(launcher, "kill"):
                launcher.kill(signal.Signals(number))  # passes it on to the ranks that this process started
        self._signal = number
        before = lightning_private.handler_before(self._trainer, number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)


def last_path(trainer: pl.Trainer) -> Path | None:
    """The path that ``ckpt_path="last"`` loads; None without a ModelCheckpoint."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            path = Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            callback.last_model_path = str(path)
            return path
    return None
