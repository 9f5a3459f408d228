"""Steps of a plain module on one rank that asks for what no schedule gives: Lightning's own loop trains it."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.strategy.plain_steps import PlainSteps


class LightningSteps(PlainSteps):
    """Runs the hooks of such a module; the engine only has evaluations and predictions."""

    @override
    def train(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """``training_step`` forward; Lightning runs backward behind it, or the module does itself."""
        with self.precision.train_step_context(), self.precision.step_context(self.engine.device):
            return self.module.training_step(batch, *args, **kwargs)
