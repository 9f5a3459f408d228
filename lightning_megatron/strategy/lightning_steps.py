"""Steps of a plain module that Lightning's own loop trains on one rank; ``single_rank.py`` says when it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override

from lightning_megatron.strategy.plain_steps import PlainSteps
from lightning_megatron.training.nonfinite import stop_on_bad_loss


class LightningSteps(PlainSteps):
    """Runs the hooks of a plain module that Lightning trains; the engine only evaluates and predicts."""

    @override
    def train(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``training_step`` forward. Lightning runs the backward pass afterwards, or the module does so itself."""
        with self.precision.train_step_context(), self.precision.step_context(self.engine.device):
            output = self.module.training_step(batch, *args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        # With detect_anomaly=True, torch says in the backward pass which operation gave the NaN.
        checks = self.stops_on_bad_loss and self.module.automatic_optimization and not torch.is_anomaly_enabled()
        if checks and isinstance(loss, torch.Tensor):
            stop_on_bad_loss(loss, loss, self.module.trainer.global_step)
        return output
