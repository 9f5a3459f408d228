"""Train transformers with Megatron-core's parallelism from a PyTorch Lightning Trainer."""

import torch as _torch

from lightning_megatron.quiet import ignore_known_warnings as _ignore_known_warnings

_ignore_known_warnings()

if not _torch.cuda.is_available():
    # megatron-core compiles small functions at their first call; without CUDA that is seconds of C++ for nothing.
    from megatron.core import jit as _jit

    _jit.disable_jit_fuser()

from lightning.pytorch.strategies import StrategyRegistry as _StrategyRegistry

from lightning_megatron.groups import average_losses_across_data_parallel_group
from lightning_megatron.layout import LayoutError, ParallelLayout
from lightning_megatron.lora import LoRA
from lightning_megatron.modules import (
    AutoModule,
    BertConfig,
    BertModule,
    GPTConfig,
    GPTModule,
    MegatronModule,
    T5Config,
    T5Module,
    on_all_stages,
)
from lightning_megatron.parameter_groups import ParameterGroups, biases_and_vectors
from lightning_megatron.precision import MegatronPrecision
from lightning_megatron.schedule import LRSchedule
from lightning_megatron.strategy import MegatronStrategy
from lightning_megatron.version import __version__

__all__ = [
    "AutoModule",
    "BertConfig",
    "BertModule",
    "GPTConfig",
    "GPTModule",
    "LRSchedule",
    "LayoutError",
    "LoRA",
    "MegatronModule",
    "MegatronPrecision",
    "MegatronStrategy",
    "ParallelLayout",
    "ParameterGroups",
    "T5Config",
    "T5Module",
    "__version__",
    "average_losses_across_data_parallel_group",
    "biases_and_vectors",
    "on_all_stages",
]

if "megatron" not in _StrategyRegistry:
    _StrategyRegistry.register("megatron", MegatronStrategy, description="megatron-core's parallelism")
