"""Steps of a MegatronModule: its chunks run on their pipeline stages, and its loss is the global batch's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from typing_extensions import override

from lightning_megatron.distributed import collectives
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.configured_module import ConfiguredModule
from lightning_megatron.models.megatron_module import MegatronModule, runs_on_all_stages
from lightning_megatron.strategy.dataloading import evaluation_sampler, rank_consistency
from lightning_megatron.strategy.logging.recorder import LogRecorder
from lightning_megatron.strategy.plain_module import check_output
from lightning_megatron.strategy.step_runner import Recorder, StepRunner
from lightning_megatron.training.batch_rows import count_rows, take_rows
from lightning_megatron.training.engine import Engine, Outcome, Step
from lightning_megatron.training.microbatches import MicroBatchSizes

_STAGES = {"validation_step": "val", "test_step": "test"}


class MegatronSteps(StepRunner):
    """Runs the hooks of a MegatronModule; see ``StepRunner``."""

    module: MegatronModule
    _last_prediction: tuple[Any, Any, Any] | None = None

    @staticmethod
    @override
    def make_engine(
        module: MegatronModule, layout: ParallelLayout, ddp: DistributedDataParallelConfig | None, device: torch.device
    ) -> Engine:
        by_token = module.loss_reduction == "token"
        own = not isinstance(module, ConfiguredModule)
        return Engine(layout, list(module.chunks), module.chunks[0].config, ddp, by_token, device, own_layers=own)

    @override
    def evaluate(self, hook: str, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``validation_step`` or ``test_step``; the loss in what it returns is the global batch's."""
        recorder = self._record(batch)
        step = self._step(hook, recorder, args, kwargs)
        self._share_buffers(args)
        self.counts = not evaluation_sampler.is_repeated_batch(self.module.trainer, self._batch_idx(args), *args[1:2])
        cut, length = self._cut_checked(batch, args)
        outcome = self.engine.evaluate(batch, replace(cut, counts=self.counts), length, step)
        self._log(outcome, recorder, _STAGES[hook])
        return outcome.hook_outputs

    @override
    def predict(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``predict_step``; every stage gets what the last stage returned."""
        if self.engine.layout.replicas_share_experts:
            collectives.on_any_rank(True)  # whether a replica predicts; those without a batch take part
            self._last_prediction = batch, args, kwargs
        return self._predict(batch, *args, **kwargs)

    @override
    def end_predictions(self) -> None:
        """Predict this replica's last batch again, for nothing, until the replicas it shares experts with have ended.

        Raises:
            DataError: This replica has no batch at all.
        """
        while self.engine.layout.replicas_share_experts and collectives.on_any_rank(False)[0]:
            if self._last_prediction is None:
                raise rank_consistency.DataError(
                    "MegatronStrategy: a replica has no batch to predict, and the replicas that it shares experts with"
                    " have some. Give each replica at least one."
                )
            batch, args, kwargs = self._last_prediction
            self._predict(batch, *args, **kwargs)
        self._last_prediction = None

    def _predict(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = self._record(batch)
        step = self._step("predict_step", recorder, args, kwargs)
        if runs_on_all_stages(self.module.predict_step):
            output = step(batch, 1.0, 0)
        else:
            output = self.engine.predict(batch, *self._cut_checked(batch, args), step)
        recorder.end_prediction()
        return output

    @override
    def _step(self, hook: str, recorder: Recorder, args: Any, kwargs: Any) -> Step:
        module, device = self.module, self.engine.device
        method = getattr(module, hook)
        in_pipeline = self.engine.layout.pp > 1 and not runs_on_all_stages(method)

        def step(micro_batch: Any, share: float, chunk: int) -> Any:
            module.active_chunk, module.in_pipeline = chunk, in_pipeline
            module.micro_batch_share = share
            try:
                with self.precision.step_context(device), recorder.listening(share, chunk):
                    output = method(micro_batch, *args, **kwargs)
            finally:
                module.in_pipeline = False
            if hook == "training_step" and module.lacks_loss(output):
                check_output(output)
            return output

        return step

    @override
    def _cut(self, batch: Any) -> tuple[MicroBatchSizes, int]:
        chosen = self.micro_batching.cut(self.engine.layout, count_rows(batch))
        if self.engine.layout.pp == 1:
            return chosen, 1  # without pipeline stages, no hidden states are sent
        first = take_rows(batch, 0, chosen.sizes[0], sum(chosen.sizes))
        return chosen, self.module.sequence_length(first)

    @override
    def _recorder(self, batch: Any) -> Recorder:
        return LogRecorder(self.module, count_rows(batch))

    @override
    def _log(self, outcome: Outcome, recorder: Recorder, stage: str) -> None:
        super()._log(outcome, recorder, stage)
        if outcome.has_loss:
            self.module.log_loss(stage, outcome.loss, outcome.weight)
