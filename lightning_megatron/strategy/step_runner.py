"""One batch through the engine: the module's own hook on each micro-batch, and what it logged, logged for the batch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_megatron.distributed import lightning_private
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.megatron_module import MegatronModule, runs_on_all_stages
from lightning_megatron.strategy.dataloading import evaluation_sampler, rank_consistency
from lightning_megatron.strategy.logging.recorder import AtOnce, LogRecorder
from lightning_megatron.strategy.plain_module import PlainModel, check_output
from lightning_megatron.strategy.precision import MegatronPrecision
from lightning_megatron.training.batch_rows import count_rows, take_rows
from lightning_megatron.training.engine import Engine, Outcome
from lightning_megatron.training.microbatches import Cut, MicroBatching

_LOGGED_AS = {"validation_step": "val", "test_step": "test"}


def make_engine(
    module: pl.LightningModule, layout: ParallelLayout, ddp: DistributedDataParallelConfig | None, device: torch.device
) -> Engine:
    """The engine of an adapter's chunks, or of a plain module as the only chunk; without ``ddp`` it only evaluates."""
    if isinstance(module, MegatronModule):
        chunks, by_token = list(module.chunks), module.loss_reduction == "token"
        return Engine(layout, chunks, module.chunks[0].config, ddp, by_token, device)
    plain = PlainModel(module)
    return Engine(
        layout, [plain], plain.config, ddp, False, device, rng_context=nullcontext
    )  # the user's own generators


class _SkippedError(Exception):
    """A ``training_step`` on one rank has returned None: the batch counts for nothing."""


@dataclass
class Steps:
    """Runs the hooks of a module on batches.

    Args:
        module: An adapter or a plain module.
        engine: Runs the schedules.
        precision: Its context surrounds each micro-batch.
        micro_batching: How batches are cut into micro-batches.
    """

    module: pl.LightningModule
    engine: Engine
    precision: MegatronPrecision
    micro_batching: MicroBatching
    told: bool = False
    counts: bool = True  # whether the batch that was evaluated last counts on this replica
    ends_window: bool = False  # whether the optimizer steps after the batch that was trained last

    def train(self, batch: Any, *args: Any, **kwargs: Any) -> Outcome | None:
        """``training_step`` forward and backward; ``finish`` it after a look at its loss. None where it was skipped."""
        trainer = self.module.trainer
        self._recorder = recorder = self._record(batch)
        self.ends_window = lightning_private.ends_accumulation(trainer)
        step = self._step("training_step", recorder, args, kwargs)
        if lightning_private.skips_backward(trainer):  # StochasticWeightAveraging's epoch for batch norms
            return self.engine.evaluate(batch, *self._shape(batch, args), step)
        window, had_gradients = trainer.accumulate_grad_batches, self.engine.has_gradients
        try:
            return self.engine.train(
                batch, *self._shape(batch, args), step, window=window, last_of_window=self.ends_window
            )
        except _SkippedError:
            self.engine.has_gradients = had_gradients
            if had_gradients and self.ends_window:
                self.engine.finish_window(window)
            return None

    def finish(self, outcome: Outcome) -> Any:
        """Log what ``train`` recorded and the loss; give what ``on_train_batch_end`` is told."""
        self._report("train", outcome, self._recorder)
        return outcome.hook_outputs

    def evaluate(self, hook: str, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """``validation_step`` or ``test_step``: what it returned, its loss that of the global batch."""
        recorder = self._record(batch)
        step = self._step(hook, recorder, args, kwargs)
        if self.engine.trains and self._batch_idx(args) == 0:
            self.engine.share_buffers()
        if not isinstance(self.module, MegatronModule):
            output = step(batch, 1.0, 0)
            recorder.replay()
            return output
        self.counts = not evaluation_sampler.is_repeated_batch(self.module.trainer, self._batch_idx(args), *args[1:2])
        chosen, length = self._shape(batch, args)
        outcome = self.engine.evaluate(batch, replace(chosen, counts=self.counts), length, step)
        self._report(_LOGGED_AS[hook], outcome, recorder)
        return outcome.hook_outputs

    def predict(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """``predict_step``: what the last stage returned, on every stage."""
        recorder = self._record(batch)
        step = self._step("predict_step", recorder, args, kwargs)
        if isinstance(self.module, MegatronModule) and not runs_on_all_stages(self.module.predict_step):
            output = self.engine.predict(batch, *self._shape(batch, args), step)
        else:
            output = step(batch, 1.0, 0)
        recorder.end_prediction()
        return output

    def _step(self, hook: str, recorder: LogRecorder | AtOnce, args: Any, kwargs: Any) -> Any:
        """One micro-batch through one chunk: the module's own hook, its logging recorded."""
        module, device = self.module, self.engine.device
        method = getattr(module, hook)
        in_pipeline = self.engine.layout.pp > 1 and not runs_on_all_stages(method)

        def step(micro_batch: Any, share: float, chunk: int) -> Any:
            if isinstance(module, MegatronModule):
                module.active_chunk, module.in_pipeline = chunk, in_pipeline
            try:
                with self.precision.step_context(device), recorder.listening(share, chunk):
                    output = method(micro_batch, *args, **kwargs)
            finally:
                if isinstance(module, MegatronModule):
                    module.in_pipeline = False
            if hook == "training_step" and (not isinstance(module, MegatronModule) or module.lacks_loss(output)):
                if output is None and self.engine.layout.world_size == 1 and not self.micro_batching.is_chosen:
                    raise _SkippedError
                check_output(output)
            return output

        return step

    def _shape(self, batch: Any, args: Any) -> tuple[Cut, int]:
        """The micro-batches of ``batch`` and the length of its hidden states."""
        if self._batch_idx(args) == 0:
            rank_consistency.check_same_batch(batch)
        if not isinstance(self.module, MegatronModule) and not self.micro_batching.is_chosen:
            return Cut((1,)), 1  # one micro-batch, whatever the batch is made of
        chosen = self.micro_batching.cut(self.engine.layout, count_rows(batch))
        if not self.told and self.engine.layout.pp > 1:
            self.told = True
            rank_zero_info(f"MegatronStrategy: {len(chosen.sizes)} micro-batches of {chosen.sizes[0]} rows per batch.")
        if self.engine.layout.pp == 1 or not isinstance(self.module, MegatronModule):
            return chosen, 1  # no hidden states travel
        first = take_rows(batch, 0, chosen.sizes[0], sum(chosen.sizes))
        return chosen, self.module.sequence_length(first)

    def _batch_idx(self, args: Any) -> int:
        """The batch's number; the loop knows it where the hook does not take it."""
        if args:
            return int(args[0])
        loop = lightning_private.active_loop(self.module.trainer)
        return int(getattr(loop, "epoch_loop", loop).batch_progress.current.ready) - 1

    def _record(self, batch: Any) -> LogRecorder | AtOnce:
        if isinstance(self.module, MegatronModule):
            recorder: LogRecorder | AtOnce = LogRecorder(self.module, count_rows(batch))
        else:
            several = self.module.trainer.training and self.micro_batching.is_chosen
            recorder = LogRecorder(self.module, 1) if several else AtOnce()
        self.engine.has_logged_values = recorder.has_entries
        return recorder

    def _report(self, stage: str, outcome: Outcome, recorder: LogRecorder | AtOnce) -> None:
        recorder.replay(gather=outcome.has_logged_values)
        if isinstance(self.module, MegatronModule) and outcome.has_loss:
            self.module.log_loss(stage, outcome.loss, outcome.weight)
