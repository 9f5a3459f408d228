"""``check_run``: checks all of a run that can be known before it starts, and trains nothing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_megatron.cli.check.first_batch import first_batch, loaders_of
from lightning_megatron.cli.check.hub_reach import offline_if_out_of_reach
from lightning_megatron.cli.check.result import RunCheck
from lightning_megatron.cli.check.run_parts import RunParts, is_out_of_reach, make_parts
from lightning_megatron.distributed import lightning_private
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.build_settings import BuildSettings
from lightning_megatron.models.megatron_module import MegatronModule
from lightning_megatron.models.memory_estimate import counted
from lightning_megatron.models.memory_settings import PRECISIONS
from lightning_megatron.models.model_config import ModelConfig
from lightning_megatron.models.trained_sizes import TrainedSizes
from lightning_megatron.strategy import checks
from lightning_megatron.strategy.megatron_strategy import MegatronStrategy


def check_run(
    source: str | Path, arguments: Sequence[str] = (), gpu_memory: float | None = None, read_data: bool = True
) -> RunCheck:
    """Check a run on any machine: its arguments, layout, micro-batches, memory, and the first batch of each loader.

    No process group is built, and no device of the run is needed. Of a model on the hub only the configuration is
    fetched.

    Args:
        source: The YAML file, as ``lightning-megatron fit --config`` takes it.
        arguments: Further arguments of ``fit``, such as ``["--trainer.devices", "8"]``.
        gpu_memory: GB of each GPU; it is a fault if the estimate is above.
        read_data: Whether the data is prepared and the first batch of each loader read.
    """
    with _quiet(), offline_if_out_of_reach():
        parts = make_parts(["--config", str(source), *arguments])
        result = RunCheck(str(source), parts.faults, parts.unreached, parts.devices)
        result.precision, result.device, result.gpu_memory = parts.precision, parts.device, gpu_memory
        if parts.module is not None:
            result.module = type(parts.module).__name__
        if parts.trainer is not None and not isinstance(parts.trainer.strategy, MegatronStrategy):
            result.unchecked.append(
                f"The strategy is {type(parts.trainer.strategy).__name__}; only runs with MegatronStrategy are checked."
            )
            return result
        _Checker(parts, result).run(read_data)
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of a Trainer, which is not this run's."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Checker:
    """Fills in a result, step by step; an error of one step is kept, and the next one goes on.

    Args:
        parts: What the run is made of.
        result: The result to fill in.
    """

    def __init__(self, parts: RunParts, result: RunCheck) -> None:
        self.parts, self.result = parts, result
        self.module, self.data, self.trainer = parts.module, parts.data, parts.trainer
        self.strategy: Any = getattr(parts.trainer, "strategy", cast(Any, None))
        self.layout: ParallelLayout | None = getattr(self.strategy, "layout", None)
        self.is_connected = False

    def run(self, read_data: bool) -> None:
        """Take all steps, whichever of them fail."""
        self.result.layout = self.layout
        self.result.accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        if self.trainer is None:
            self.result.unchecked.append(
                "Batches, data and memory: they are checked once a Trainer with these settings can be made."
            )
        if self.module is not None:
            if self.trainer is not None:
                self.is_connected = self._try(self._connect)
            self._try(self._count_parameters)
        rows = self._told_rows()
        batch = self._read_loaders() if read_data else None
        if self.result.rows is None:
            self.result.rows = rows
        if self.layout is not None and self.result.rows is not None:
            self._try(self._cut)
            self._try(lambda: self._count_tokens(batch))
        self._try(self._estimate)

    def _try(self, step: Callable[[], None]) -> bool:
        try:
            step()
        except Exception as error:  # hooks and data of the user's may raise anything
            self.parts.note(error)
            return False
        return True

    def _connect(self) -> None:
        """Check the module against the Trainer as ``fit`` does before it starts processes."""
        assert self.trainer is not None
        assert self.module is not None
        lightning_private.attach_to_fit(self.trainer, self.module, self.data)
        try:
            self.strategy.connect(self.module)
        except Exception as error:
            # The vocabulary may be elsewhere; all else can be checked.
            if is_out_of_reach(error) and isinstance(self.module, MegatronModule) and self.layout is not None:
                self._try(partial(self.module.check_layout, self.layout))
            raise
        self.layout = self.result.layout = self.strategy.layout
        checks.check_trainer(self.trainer)
        if isinstance(self.module, MegatronModule):
            device = torch.device(self.parts.device)
            kernels = self.strategy.kernels.on(device)
            self.module.settings = BuildSettings(
                layout=self.layout,
                recompute=self.strategy.recompute,
                kernels=kernels,
                cp_comm=self.strategy.cp_comm,
                device=device,
            )

    @property
    def _config(self) -> ModelConfig | None:
        config = getattr(self.module, "config", None)
        return config if isinstance(config, ModelConfig) else None

    @property
    def _has_sizes(self) -> bool:
        """Whether batches can be checked: the data gives what the configuration leaves out when both are connected."""
        config = self._config
        return self.is_connected or (config is not None and None not in (config.vocab_size, config.seq_length))

    def _count_parameters(self) -> None:
        config = self._config
        if config is None:
            found = [parameter.numel() for parameter in self.module.parameters()]  # type: ignore[union-attr]
            self.result.num_parameters = sum(found) or None
        elif config.vocab_size is not None and config.seq_length is not None:
            config, one = replace(config, make_vocab_size_divisible_by=1), ParallelLayout(world_size=1)
            chunks = config.chunks(one)
            self.result.num_parameters = sum(config.parameters(one, chunk) for chunk in chunks)
            self.result.num_active = (
                (self.result.num_parameters - config.unused_parameters) if config.unused_parameters else None
            )
            if lora := getattr(self.module, "lora", None):
                counts = counted(config, one, TrainedSizes(config, one, lora), chunks)
                self.result.num_trained = sum(trained for _, trained in counts)

    def _told_rows(self) -> int | None:
        """The rows of a batch on one replica, as the data module's arguments have them."""
        rows, every = (getattr(self.data, name, None) for name in ("batch_size", "global_batch_size"))
        if isinstance(rows, int):
            return rows
        if isinstance(every, int) and self.layout is not None:
            if every % self.layout.dp:
                self.result.faults.append(
                    f"global_batch_size={every} does not divide by the {self.layout.dp} data-parallel ranks. Use"
                    f" {max(every // self.layout.dp, 1) * self.layout.dp}."
                )
                return None
            return every // self.layout.dp
        return None

    def _read_loaders(self) -> Any:
        """Read and check the first batch of each loader; returns that of training."""
        source = self.data or self.module
        if source is None or self.trainer is None or not self._try(lambda: self._prepare(source)):
            return None
        first = None
        try:
            for name, loader in loaders_of(self.trainer, source):
                self._try(partial(self._check_loader, loader))
                batch, found = first_batch(name, loader, self._tokenizer())
                self.result.loaders.append(found)
                if name == "train":
                    first, self.result.rows = batch, found.rows
                if isinstance(self.module, MegatronModule) and self._has_sizes:
                    self._try(partial(self.module.check_batch, batch))
        except Exception as error:  # a dataset of the user's may raise anything
            self.parts.note(error)
        return first

    def _check_loader(self, loader: Any) -> None:
        checks.check_loader(self.strategy.layout, loader, self.strategy.micro_batching)

    def _prepare(self, source: Any) -> None:
        if is_overridden("prepare_data", source):
            source.prepare_data()
        source.setup("fit")

    def _tokenizer(self) -> Any:
        found = getattr(self.data, "tokenizer", None)
        return found if hasattr(found, "decode") else None

    def _cut(self) -> None:
        """The micro-batches of a batch."""
        rows, micro_batching = self.result.rows, self.strategy.micro_batching
        assert self.layout is not None
        assert rows is not None
        if not self.result.loaders:
            checks.check_loader(self.layout, SimpleNamespace(batch_size=rows), micro_batching)
        if isinstance(self.module, MegatronModule) or micro_batching.is_chosen:
            self.result.micro_batches = micro_batching.cut(self.layout, rows).sizes
        else:
            self.result.micro_batches = (rows,)

    def _count_tokens(self, batch: Any) -> None:
        if not isinstance(self.module, MegatronModule) or self.result.global_batch is None:
            return
        is_checked = batch is not None and self.module.settings is not None
        lengths = self.module.lengths(batch) if is_checked else ()
        if not any(lengths) and self._config is not None and self._config.seq_length is not None:
            lengths = self._config.lengths
        self.result.tokens = self.result.global_batch * sum(lengths) or None

    def _estimate(self) -> None:
        """The memory of a rank, against that of a GPU."""
        config, layout = self._config, self.layout
        if self.module is None or layout is None:
            return
        if config is None:
            self._tell_states(self.module, layout)
            return
        for name in ("vocab_size", "seq_length"):
            if getattr(config, name) is None:
                self.result.unchecked.append(
                    f"The memory, which depends on {name}: check with --model.config.{name}, or where the data is."
                )
                return
        cut = self.result.micro_batches
        size = cut[0] if cut else self.strategy.micro_batching.size or 1
        self.result.memory = layout.memory(
            config,
            micro_batch_size=size,
            num_microbatches=len(cut) or None,
            precision=self.parts.precision,
            recompute=self.strategy.recompute,
            distributed_optimizer=self.strategy.distributed_optimizer,
            kernels=self.strategy.kernels,
            cp_comm=self.strategy.cp_comm,
            optimizer=self.module.optimizer,
            lora=getattr(self.module, "lora", None),
            device=self.parts.device,
        )
        largest = self.result.memory.largest.total / 1e9
        if self.result.gpu_memory is not None and largest > self.result.gpu_memory:
            self.result.faults.append(
                f"A rank takes {largest:.2f} GB, and a GPU has {self.result.gpu_memory:g} GB. Use a smaller"
                " micro_batch_size, recompute='selective' or 'full', sequence_parallel=True, or a larger tp, pp or cp."
            )

    def _tell_states(self, module: pl.LightningModule, layout: ParallelLayout) -> None:
        """Say what is known of the memory of a module without a configuration: what stays from step to step."""
        name, parameters = type(module).__name__, list(module.parameters())
        measured = "The callback lightning_megatron.callbacks.MemoryMonitor measures it in a run of some steps."
        if self.result.gpu_memory is not None:
            self.result.unchecked.append(f"Whether {name} fits the GPU. {measured}")
        if isinstance(module, MegatronModule) or not parameters:
            self.result.states = f"not known before the run, in which {name} makes its layers. {measured}"
            return
        weight, gradient, main = PRECISIONS[self.parts.precision] if "true" in self.parts.precision else (4, 4, 0)
        every = sum(parameter.numel() for parameter in parameters)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        copies = layout.dp if self.strategy.distributed_optimizer else 1
        stays = every * weight + trained * (gradient + (main + 8) / copies)
        size = f"{stays / 1e9:.2f} GB" if stays >= 1e9 else f"{stays / 1e6:.2f} MB"
        self.result.states = (
            f"{size} on each rank: weights, gradients and the state of AdamW; the activations of {name} are"
            f" not known before the run. {measured}"
        )
