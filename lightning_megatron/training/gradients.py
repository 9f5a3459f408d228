"""Exposes the gradients in megatron-core's buffers as ``parameter.grad`` to hooks, and takes changes back."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import WarningCache

from lightning_megatron.training.engine import Engine

_OF_CALLBACKS = ("on_after_backward", "on_before_optimizer_step")
_OF_MODULES = (*_OF_CALLBACKS, "configure_gradient_clipping", "optimizer_step")


_warnings = WarningCache()


def hooks_read_gradients(trainer: pl.Trainer) -> bool:
    """Whether a hook of the user runs between the backward pass and the optimizer step."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(is_overridden(name, trainer.lightning_module) for name in _OF_MODULES) or any(
        is_overridden(name, callback, parent=pl.Callback) for callback in callbacks for name in _OF_CALLBACKS
    )


class ExposedGradients:
    """Exposes the finished gradients of an accumulation window, and takes back the changes that hooks make.

    The gradients are those of the global batch, without loss scale; each rank has those of its own shards. Gradients
    of the distributed optimizer are gathered first, which costs one more all-gather of their size.

    Args:
        engine: The engine whose gradients are finished.
        loss_scale: The loss scale that the gradients are multiplied by.
    """

    def __init__(self, engine: Engine, loss_scale: float) -> None:
        self._loss_scale = loss_scale
        self._parts_of_models = engine.is_model_sharded
        self._buffers = [b for chunk in engine.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        for buffer in self._buffers:
            _gather(buffer)
            if loss_scale != 1.0:
                buffer.grad_data.div_(loss_scale)
            for parameter in buffer.params:
                _set(parameter, parameter.main_grad)
        self._versions = self._seen_versions()

    def take_back(self) -> bool:
        """Hide the gradients again; the optimizer gets them with the changes that hooks have made.

        Returns:
            Whether any gradient is left: hooks may have set all to None, as ``module.zero_grad()`` does.
        """
        left = [p for buffer in self._buffers for p in buffer.params if p.grad is not None or not _can_show(p)]
        changed = self._seen_versions() != self._versions
        for buffer in self._buffers:
            for parameter in buffer.params:
                if parameter.grad is None and _can_show(parameter):
                    parameter.main_grad.zero_()
                elif parameter.grad is not None and parameter.grad is not parameter.main_grad:
                    parameter.main_grad.copy_(parameter.grad)
                    changed = True
                _set(parameter, None)
            if self._loss_scale != 1.0:
                buffer.grad_data.mul_(self._loss_scale)
        if changed and self._parts_of_models:
            _warnings.warn(
                "A hook has changed gradients. Each rank has the gradients of its own part of the model, so a norm that"
                " a hook computes is not the model's, and differs between ranks. Clip with self.clip_gradients or"
                " gradient_clip_val."
            )
        return bool(left)

    def _seen_versions(self) -> list[int]:
        """A number for each buffer that every change in place raises; private in torch (2.13)."""
        return [buffer.grad_data._version for buffer in self._buffers]


def _gather(buffer: Any) -> None:
    """All-gather the gradients that the distributed optimizer has sharded over the replicas."""
    group = buffer.data_parallel_group
    if buffer.ddp_config.use_distributed_optimizer and group.size() > 1:
        for bucket in buffer.buckets:
            shards = bucket.grad_data.view(group.size(), -1)
            dist.all_gather_into_tensor(bucket.grad_data, shards[group.rank()].clone(), group=group)


def _can_show(parameter: torch.nn.Parameter) -> bool:
    """Whether ``grad`` can be set: torch before 2.10 allows no other dtype than the parameter's."""
    return parameter.main_grad.dtype == parameter.dtype or hasattr(parameter, "grad_dtype")  # type: ignore[attr-defined]


def _set(parameter: torch.nn.Parameter, gradient: torch.Tensor | None) -> None:
    if not _can_show(parameter):
        return
    if gradient is None:
        parameter.grad = None
    if parameter.main_grad.dtype != parameter.dtype:  # type: ignore[attr-defined]
        parameter.grad_dtype = parameter.dtype if gradient is None else gradient.dtype
    parameter.grad = gradient
