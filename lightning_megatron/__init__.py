"""Train transformers with Megatron-core's parallelism from a PyTorch Lightning Trainer."""

__version__ = "0.1.0.dev0"

import torch as _torch

from lightning_megatron.distributed.former_names import keep_former_names as _keep_former_names
from lightning_megatron.distributed.warning_filters import ignore_known_warnings as _ignore_known_warnings

_keep_former_names()
_ignore_known_warnings()

if not _torch.cuda.is_available():
    # megatron-core compiles small functions at their first call; without CUDA that is seconds of C++ for nothing.
    from megatron.core import jit as _jit

    _jit.disable_jit_fuser()

from lightning.pytorch.strategies import StrategyRegistry as _StrategyRegistry

from lightning_megatron.checkpoint import Checkpointing
from lightning_megatron.distributed.collectives import average_losses_across_data_parallel_group
from lightning_megatron.distributed.layout import LayoutError, ParallelLayout
from lightning_megatron.models import (
    AutoModule,
    BertConfig,
    BertModule,
    GPTConfig,
    GPTModule,
    Kernels,
    MegatronModule,
    T5Config,
    T5Module,
    on_all_stages,
)
from lightning_megatron.models.lora import LoRA
from lightning_megatron.strategy.megatron_strategy import MegatronStrategy
from lightning_megatron.strategy.precision import MegatronPrecision
from lightning_megatron.training.lr_schedule import LRSchedule
from lightning_megatron.training.optimizers import LeanAdamW, Muon
from lightning_megatron.training.parameter_groups import ParameterGroups, biases_and_vectors

__all__ = [
    "AutoModule",
    "BertConfig",
    "BertModule",
    "Checkpointing",
    "GPTConfig",
    "GPTModule",
    "Kernels",
    "LRSchedule",
    "LayoutError",
    "LeanAdamW",
    "LoRA",
    "MegatronModule",
    "MegatronPrecision",
    "MegatronStrategy",
    "Muon",
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
