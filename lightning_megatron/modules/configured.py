"""``ConfiguredModule``: what the adapters share that are made from a ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.modules.base import Batch, LossReduction, MegatronModule, SchedulerCallable
from lightning_megatron.modules.model_config import ModelConfig
from lightning_megatron.parameter_groups import OptimizerCallable, ParameterGroups
from lightning_megatron.schedule import LRSchedule


class ConfiguredModule(MegatronModule):
    """The base of a family's adapter.

    Args:
        config: The shape of the model, a ``config_type``.
        optimizer: Makes the torch optimizer from the parameters, or ``ParameterGroups``; AdamW by default.
        lr_schedule: ``LRSchedule``, or makes a scheduler from that optimizer; see ``MegatronModule``.
        loss_reduction: "token" or "micro_batch", see ``MegatronModule``.

    Raises:
        TypeError: The configuration is another family's, or none.
    """

    config_type: ClassVar[type[ModelConfig]]

    def __init__(
        self,
        config: ModelConfig,
        optimizer: ParameterGroups | OptimizerCallable | None = None,
        lr_schedule: LRSchedule | SchedulerCallable | None = None,
        loss_reduction: LossReduction = "token",
    ) -> None:
        super().__init__(optimizer, lr_schedule, loss_reduction)
        if not isinstance(config, self.config_type):
            wanted = self.config_type.__name__
            raise TypeError(
                f"{type(self).__name__}(config={config!r}): use a {wanted}, such as {wanted}(num_layers=4, ...)."
            )
        self.config = config
        self.save_hyperparameters("config", "loss_reduction", logger=False)

    def check_layout(self, layout: ParallelLayout) -> None:
        """Refuse sizes that the layout cannot divide."""
        self.config.check(layout)

    @property
    def has_own_get_batch(self) -> bool:
        """Whether a class of the user's has overridden ``get_batch``: then its batches may look like anything."""
        return not type(self).get_batch.__module__.startswith("lightning_megatron.")

    def readable(self, batch: Any) -> Batch:
        """A batch in a form that the family knows, not padded: as the loader or an overridden ``get_batch`` made it.

        Raises:
            ValueError: It is no mapping of tensors.
        """
        if self.has_own_get_batch:
            self._pads = False
            try:
                return self.get_batch(batch)
            finally:
                self._pads = True
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"{type(self).__name__} takes batches that are dicts of tensors; this one is a {type(batch).__name__}."
                " Return a dict from the collate function, or override get_batch."
            )
        return dict(batch)

    def forward(self, **batch: Any) -> Any:
        """What ``predict_step`` gives, where the model is whole on the rank.

        Raises:
            RuntimeError: With pipeline stages; ``trainer.predict`` gives it under every layout.
        """
        if self.build_settings.layout.pp > 1:
            raise RuntimeError(
                f"{type(self).__name__}.forward needs pp=1: here are pipeline stages. Use trainer.predict."
            )
        return self.predict_step(batch, 0)
