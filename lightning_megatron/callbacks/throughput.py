"""``Throughput``: tokens and samples a second, TFLOP/s and MFU, and what the run has consumed."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_megatron.callbacks.logging_schedule import log, logs_now
from lightning_megatron.callbacks.peak_flops import peak_flops
from lightning_megatron.distributed import lightning_private, process_groups
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.models.flops import training_flops
from lightning_megatron.models.megatron_module import MegatronModule
from lightning_megatron.models.model_config import ModelConfig
from lightning_megatron.training.batch_rows import count_rows


class _Work(NamedTuple):
    """The time, tokens, samples and operations of one optimizer step over all replicas."""

    seconds: float
    samples: float
    tokens: float
    flops: float


@answer_wrong_names
class Throughput(pl.Callback):
    """Logs how fast training goes, over the last steps and all ranks; the same values on every rank.

    ``tokens_per_second``, ``tokens_per_second_per_device``, ``samples_per_second``, ``tflops_per_device``, ``mfu`` (of
    the device's peak, 0 to 1), ``consumed_samples`` and ``consumed_tokens`` (since the start of training, resumed runs
    included). A plain LightningModule has samples only.

    Tokens are all that the model runs over, padding included; of a T5, both sides'. Loading data and writing
    checkpoints count as time, validation does not.

    Args:
        window: Number of optimizer steps over which a value is averaged.
        peak_tflops: Peak TFLOP/s of one device. None: that of the data sheet, without sparsity; for an unknown device
            (a CPU), the rate that a matrix product reaches when training starts.
    """

    def __init__(self, window: int = 20, peak_tflops: float | None = None) -> None:
        arguments = Arguments("Throughput", MisconfigurationException)
        arguments.whole(None, window=window)
        arguments.number(optional=True, peak_tflops=peak_tflops)
        if window < 1 or (peak_tflops is not None and peak_tflops <= 0):
            raise MisconfigurationException(f"Throughput(window={window}, peak_tflops={peak_tflops}): use 1 or more.")
        self.window = window
        self.peak_tflops = peak_tflops
        self.consumed_samples = 0
        self.consumed_tokens = 0
        self._steps: deque[_Work] = deque(maxlen=window)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"consumed_samples": self.consumed_samples, "consumed_tokens": self.consumed_tokens}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consumed_samples, self.consumed_tokens = state_dict["consumed_samples"], state_dict["consumed_tokens"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.peak_tflops is None and isinstance(pl_module, MegatronModule):
            strategy: Any = trainer.strategy
            self.peak_tflops = peak_flops(strategy.root_device, strategy.precision_plugin.compute_dtype) / 1e12
        self._steps.clear()
        self._since_the_step = [0.0, 0.0, 0.0]
        self._last = time.monotonic()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating = time.monotonic()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.training and hasattr(self, "_last"):
            self._last += time.monotonic() - self._validating

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = _replicas_sum(_work_of(pl_module, batch))
        self._since_the_step = [before + now for before, now in zip(self._since_the_step, done, strict=True)]
        self.consumed_samples += int(done[0])
        self.consumed_tokens += int(done[1])
        if not lightning_private.ends_accumulation(trainer):
            return
        now = time.monotonic()
        self._steps.append(_Work(now - self._last, *self._since_the_step))
        self._last, self._since_the_step = now, [0.0, 0.0, 0.0]
        if logs_now(trainer):
            log(pl_module, self._values(trainer.world_size))

    def _values(self, world_size: int) -> dict[str, float]:
        seconds, samples, tokens, flops = (sum(values) for values in zip(*self._steps, strict=True))
        values = {"samples_per_second": samples / seconds, "consumed_samples": float(self.consumed_samples)}
        if tokens:
            each = flops / seconds / world_size / 1e12
            values |= {
                "tokens_per_second": tokens / seconds,
                "tokens_per_second_per_device": tokens / seconds / world_size,
                "tflops_per_device": each,
                "consumed_tokens": float(self.consumed_tokens),
            }
            if self.peak_tflops:
                values["mfu"] = each / self.peak_tflops
        return values


def _work_of(module: pl.LightningModule, batch: Any) -> list[float]:
    """Samples, tokens and operations of a replica's batch."""
    rows = count_rows(batch)
    if not isinstance(module, MegatronModule):
        return [float(rows), 0.0, 0.0]
    config = getattr(module, "config", None)
    lengths = module.lengths(batch)
    flops = training_flops(config, lengths) if isinstance(config, ModelConfig) else 0.0
    return [float(rows), float(rows * sum(lengths)), rows * flops]


def _replicas_sum(values: list[float]) -> list[float]:
    """Sum over the replicas, host to host: no rank waits for its device."""
    replicas = process_groups.replicas().size()
    if replicas == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64, device="cpu")
    dist.all_reduce(summed, group=process_groups.gloo_world())
    return [value / (dist.get_world_size() // replicas) for value in summed.tolist()]
