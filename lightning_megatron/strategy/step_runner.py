"""Runs one batch through the engine: the module's hook on each micro-batch, and its log for the whole batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_megatron.distributed import lightning_private
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.strategy import run_line
from lightning_megatron.strategy.dataloading import rank_consistency
from lightning_megatron.strategy.logging.recorder import LogRecorder, NullRecorder
from lightning_megatron.strategy.precision import MegatronPrecision
from lightning_megatron.training.engine import Engine, Outcome, Step
from lightning_megatron.training.microbatches import MicroBatching, MicroBatchSizes

Recorder = LogRecorder | NullRecorder


class StepRunner(ABC):
    """Runs a module's hooks on batches. A subclass for each kind of module is chosen once, when a run is set up.

    Args:
        module: The module whose hooks are run.
        engine: The engine that runs the schedules.
        precision: The plugin whose context surrounds each micro-batch.
        micro_batching: How batches are cut into micro-batches.
        stops_on_bad_loss: Whether a training that Lightning's own loop runs ends with an error where a loss is NaN or
            infinite; where a schedule runs it, the optimizer looks.

    Attributes:
        counts: Whether the batch that was evaluated last counts on this replica.
        ends_window: Whether the optimizer steps after the batch that was trained last.
        micro_batch_size: Rows of the first micro-batch of the last batch; None before the first one.
    """

    def __init__(
        self,
        module: Any,
        engine: Engine,
        precision: MegatronPrecision,
        micro_batching: MicroBatching,
        stops_on_bad_loss: bool,
    ) -> None:
        self.module = module
        self.engine = engine
        self.precision = precision
        self.micro_batching = micro_batching
        self.stops_on_bad_loss = stops_on_bad_loss
        self.counts = True
        self.ends_window = False
        self.micro_batch_size: int | None = None

    @staticmethod
    @abstractmethod
    def make_engine(
        module: Any, layout: ParallelLayout, ddp: DistributedDataParallelConfig | None, device: torch.device
    ) -> Engine:
        """The engine of the module's chunks; without ``ddp`` it only evaluates."""

    def train(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``training_step`` forward and backward.

        Returns:
            The outputs for ``on_train_batch_end``; None where the batch was skipped.
        """
        recorder = self._record(batch)
        self.ends_window = lightning_private.ends_accumulation(self.module.trainer)
        outcome = self._run_schedule(batch, recorder, args, kwargs)
        if outcome is None:
            return None
        self._log(outcome, recorder, "train")
        return outcome.hook_outputs

    @abstractmethod
    def evaluate(self, hook: str, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``validation_step`` or ``test_step``, and return its output."""

    @abstractmethod
    def predict(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``predict_step``, and return its output."""

    def end_predictions(self) -> None:  # noqa: B027
        """Take part in predictions of other replicas that need this one, which has no more batches."""

    def _run_schedule(self, batch: Any, recorder: Recorder, args: Any, kwargs: Any) -> Outcome | None:
        trainer: pl.Trainer = self.module.trainer
        step, (cut, length) = self._step("training_step", recorder, args, kwargs), self._cut_checked(batch, args)
        if lightning_private.skips_backward(trainer):
            return self.engine.evaluate(batch, cut, length, step)
        window = trainer.accumulate_grad_batches
        return self.engine.train(batch, cut, length, step, window=window, last_of_window=self.ends_window)

    @abstractmethod
    def _step(self, hook: str, recorder: Recorder, args: Any, kwargs: Any) -> Step:
        """The function that runs the module's hook on a micro-batch and records what it logs."""

    @property
    def _counts_rows(self) -> bool:
        """Whether batches have rows that are counted."""
        return True

    @abstractmethod
    def _cut(self, batch: Any) -> tuple[MicroBatchSizes, int]:
        """The micro-batches of ``batch``, and the length of its hidden states."""

    @abstractmethod
    def _recorder(self, batch: Any) -> Recorder:
        """The object that records ``self.log`` while ``batch`` runs."""

    def _cut_checked(self, batch: Any, args: Any) -> tuple[MicroBatchSizes, int]:
        first = self._batch_idx(args) == 0
        (rank_consistency.check_same_batch if first else rank_consistency.check_same_shapes)(batch)
        cut, length = self._cut(batch)
        if self.micro_batch_size is None:
            run_line.tell(self.engine.layout, cut, self._counts_rows)
        self.micro_batch_size = cut.sizes[0]
        return cut, length

    def _batch_idx(self, args: Any) -> int:
        """The number of the batch; the loop knows it where the hook does not take it."""
        if args:
            return int(args[0])
        loop = lightning_private.active_loop(self.module.trainer)
        return int(getattr(loop, "epoch_loop", loop).batch_progress.current.ready) - 1

    def _share_buffers(self, args: Any) -> None:
        """Give the replicas one another's buffers (batch norms) before the first batch of an evaluation in a fit."""
        if self.engine.trains and self._batch_idx(args) == 0:
            self.engine.share_buffers()

    def _record(self, batch: Any) -> Recorder:
        recorder = self._recorder(batch)
        self.engine.has_logged_values = recorder.has_entries
        return recorder

    def _log(self, outcome: Outcome, recorder: Recorder, stage: str) -> None:
        """Log for the batch what its micro-batches logged."""
        recorder.replay(gather=outcome.has_logged_values)
