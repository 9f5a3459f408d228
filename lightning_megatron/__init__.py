"""Train transformers with Megatron-core's parallelism from a PyTorch Lightning Trainer.

Importing the package imports nothing heavy: a name is imported when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_megatron.distributed import at_import, wrong_names
from lightning_megatron.distributed.first_use import import_at_first_use

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from lightning_megatron.checkpoint import Checkpointing
    from lightning_megatron.distributed.collectives import average_losses_across_data_parallel_group
    from lightning_megatron.distributed.layout import LayoutError, ParallelLayout
    from lightning_megatron.models import (
        AutoModule,
        BertConfig,
        BertModule,
        ExpertLayer,
        Experts,
        GPTConfig,
        GPTModule,
        Kernels,
        LatentAttention,
        MegatronModule,
        ModelChunk,
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

# The names above by the modules that they are imported from.
_NAMES = {
    "checkpoint": ["Checkpointing"],
    "distributed.collectives": ["average_losses_across_data_parallel_group"],
    "distributed.layout": ["LayoutError", "ParallelLayout"],
    "models": [
        "AutoModule",
        "BertConfig",
        "BertModule",
        "ExpertLayer",
        "Experts",
        "GPTConfig",
        "GPTModule",
        "Kernels",
        "LatentAttention",
        "MegatronModule",
        "ModelChunk",
        "T5Config",
        "T5Module",
        "on_all_stages",
    ],
    "models.lora": ["LoRA"],
    "strategy.megatron_strategy": ["MegatronStrategy"],
    "strategy.precision": ["MegatronPrecision"],
    "training.lr_schedule": ["LRSchedule"],
    "training.optimizers": ["LeanAdamW", "Muon"],
    "training.parameter_groups": ["ParameterGroups", "biases_and_vectors"],
}
_find = import_at_first_use(__name__, _NAMES)
_ROOMS = {"callbacks", "checkpoint", "cli", "data", "distributed", "hf", "models", "strategy", "training"}

__all__ = [
    "AutoModule",
    "BertConfig",
    "BertModule",
    "Checkpointing",
    "ExpertLayer",
    "Experts",
    "GPTConfig",
    "GPTModule",
    "Kernels",
    "LRSchedule",
    "LatentAttention",
    "LayoutError",
    "LeanAdamW",
    "LoRA",
    "MegatronModule",
    "MegatronPrecision",
    "MegatronStrategy",
    "ModelChunk",
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


def __getattr__(name: str) -> Any:
    return import_module(f"{__name__}.{name}") if name in _ROOMS else _find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _megatron_lm_setting(name: str, owner: str) -> str:
    if "torch" not in sys.modules:  # a mistyped option of the command does not wait for an import of seconds
        return ""
    from lightning_megatron.cli.migrate.settings_table import whereabouts

    return whereabouts(name, owner)


wrong_names.further_tables.append(_megatron_lm_setting)  # which imports it when an argument does not exist
at_import.prepare()
