"""Steps of a plain LightningModule, which every rank holds whole as its one model chunk."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from typing_extensions import override

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.strategy.logging.recorder import LogRecorder, NullRecorder
from lightning_megatron.strategy.plain_module import PlainModel, check_output
from lightning_megatron.strategy.step_runner import Recorder, StepRunner
from lightning_megatron.training.batch_rows import count_rows
from lightning_megatron.training.engine import Engine, Outcome, Step
from lightning_megatron.training.microbatches import MicroBatchSizes


class _SkippedError(Exception):
    """``training_step`` has returned None on the only rank, which skips the batch."""


class PlainSteps(StepRunner):
    """Runs the hooks of a plain module that a schedule trains; see ``StepRunner``."""

    module: pl.LightningModule

    @staticmethod
    @override
    def make_engine(
        module: pl.LightningModule,
        layout: ParallelLayout,
        ddp: DistributedDataParallelConfig | None,
        device: torch.device,
    ) -> Engine:
        """The engine whose only chunk is the module; its random numbers come from the user's own generators."""
        plain = PlainModel(module, layout)
        return Engine(layout, [plain], plain.config, ddp, False, device, nullcontext, own_layers=True)

    @override
    def evaluate(self, hook: str, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``validation_step`` or ``test_step`` on the whole batch, and return its output."""
        recorder = self._record(batch)
        self._share_buffers(args)
        output = self._step(hook, recorder, args, kwargs)(batch, 1.0, 0)
        recorder.replay()
        return output

    @override
    def predict(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``predict_step`` on the whole batch, and return its output."""
        recorder = self._record(batch)
        output = self._step("predict_step", recorder, args, kwargs)(batch, 1.0, 0)
        recorder.end_prediction()
        return output

    @override
    def _run_schedule(self, batch: Any, recorder: Recorder, args: Any, kwargs: Any) -> Outcome | None:
        had_gradients = self.engine.has_gradients
        try:
            return super()._run_schedule(batch, recorder, args, kwargs)
        except _SkippedError:
            self.engine.has_gradients = had_gradients
            if had_gradients and self.ends_window:
                self.engine.finish_window(self.module.trainer.accumulate_grad_batches)
            return None

    @override
    def _step(self, hook: str, recorder: Recorder, args: Any, kwargs: Any) -> Step:
        method, device = getattr(self.module, hook), self.engine.device
        may_skip = self.engine.layout.world_size == 1 and not self.micro_batching.is_chosen

        def step(micro_batch: Any, share: float, chunk: int) -> Any:
            with self.precision.step_context(device), recorder.listening(share, chunk):
                output = method(micro_batch, *args, **kwargs)
            if hook == "training_step":
                if output is None and may_skip:
                    raise _SkippedError
                check_output(output)
            return output

        return step

    @property
    @override
    def _counts_rows(self) -> bool:
        return self.micro_batching.is_chosen

    @override
    def _cut(self, batch: Any) -> tuple[MicroBatchSizes, int]:
        if not self.micro_batching.is_chosen:
            return MicroBatchSizes((1,)), 1  # a batch of any type is one micro-batch
        return self.micro_batching.cut(self.engine.layout, count_rows(batch)), 1

    @override
    def _recorder(self, batch: Any) -> Recorder:
        several = self.module.trainer.training and self.micro_batching.is_chosen
        return LogRecorder(self.module, 1) if several else NullRecorder()
