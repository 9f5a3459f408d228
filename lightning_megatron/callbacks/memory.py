"""``MemoryMonitor``: each rank's memory, and how much its weights, gradients and optimizer should take."""

from __future__ import annotations

import resource
import sys
from dataclasses import astuple, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_megatron.callbacks.logging_schedule import log, logs_now
from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.training.engine import Engine
from lightning_megatron.training.optimizer import ShardedOptimizer
from lightning_megatron.training.optimizers.state_size import states_of
from lightning_megatron.training.saved_bytes import SavedBytes

_GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes that one rank holds through a whole step; activations come on top.

    Args:
        weights: Bytes of the weights of its part of the model.
        gradients: Bytes of megatron-core's gradient buffers.
        optimizer: Bytes of this rank's share of the optimizer's state, with main weights if they are copies.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The bytes of all parts together."""
        return sum(astuple(self))


def estimate(engine: Engine, optimizer: ShardedOptimizer) -> Estimate:
    """What a rank's parts take by their sizes, known before the first step.

    Args:
        engine: The engine, which has the chunks and their gradient buffers.
        optimizer: The optimizer of their weights.
    """
    weights = sum(p.numel() * p.element_size() for chunk in engine.chunks for p in chunk.parameters())
    buffers = [b for chunk in engine.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers)
    inner, held = optimizer.inner.optimizer, 0
    for part in optimizer.parameter_slices():
        own = part.main_param.dtype != part.parameter.dtype
        states = states_of(inner, part.main_param.device.type)
        held += int(part.main_param.numel() * part.main_param.element_size() * (own + states))
    return Estimate(weights, gradients, held)


class MemoryMonitor(pl.Callback):
    """Logs ``memory_gib``, the most that any rank has taken, and ``memory_estimate_gib``, what that rank's estimate is.

    On GPUs it is what torch has allocated at most; on a CPU the process's largest resident set, the interpreter and
    its libraries included. The first time, a line names the rank and what its estimate is made of; on a CPU also the
    activations that the first step kept for its backward passes, which torch counts there. What is above the estimate
    is theirs, and buffers': ``ParallelLayout.memory`` estimates them.
    """

    watches_megatron = True  # so that a plain module on one rank is trained by Megatron's steps, too

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        self._device = strategy.root_device
        self._estimates = collectives.gather(
            estimate(strategy.engine, strategy.optimizers[0]), process_groups.gloo_world()
        )
        self._told = False
        self._saved: SavedBytes | None = None
        self._activations = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        fused = trainer.strategy.kernels.on(self._device).fused_layers  # type: ignore[attr-defined]
        if self._device.type == "cpu" and not self._activations and not fused:  # fused ones refuse torch's hooks
            self._saved = SavedBytes(pl_module.parameters())
            self._saved.__enter__()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    def _stop_counting(self) -> None:
        """End the count of the first step's activations."""
        saved, self._saved = getattr(self, "_saved", None), None
        if saved is not None:
            saved.__exit__()
            self._activations = saved.peak

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._stop_counting()
        if not logs_now(trainer):
            return
        taken = collectives.gather(_taken(self._device), process_groups.gloo_world())
        most = max(range(len(taken)), key=lambda rank: taken[rank])
        expected = self._estimates[most]
        log(pl_module, {"memory_gib": taken[most] / _GIB, "memory_estimate_gib": expected.total / _GIB})
        activations = collectives.gather(self._activations, process_groups.gloo_world()) if not self._told else []
        if not self._told:
            self._told = True
            kept = f" The first step kept {activations[most] / _GIB:.3g} of activations." if activations[most] else ""
            name = trainer.strategy.layout.rank_name(most)  # type: ignore[attr-defined]
            rank_zero_info(
                f"Memory: {name} takes the most, {taken[most] / _GIB:.2f} GiB. By its sizes:"
                f" weights {expected.weights / _GIB:.2f}, gradients {expected.gradients / _GIB:.2f}, optimizer"
                f" {expected.optimizer / _GIB:.2f}; the rest is activations and what the process itself takes.{kept}"
            )


def _taken(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
