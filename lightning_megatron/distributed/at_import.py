"""What importing the package does: it prepares Lightning and megatron-core for it, and imports neither."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_megatron.distributed.former_names import keep_former_names
from lightning_megatron.distributed.warning_filters import ignore_known_warnings
from lightning_megatron.distributed.when_imported import when_imported

# What a YAML file may name by a class's short name: jsonargparse finds subclasses that are imported.
_NAMED_IN_FILES = ("callbacks", "data", "models", "strategy.megatron_strategy", "training.lr_schedule")


def prepare() -> None:
    """Called once, when the package is imported."""
    keep_former_names()
    ignore_known_warnings()
    when_imported("megatron.core.jit", _compile_nothing_without_cuda)
    when_imported("lightning.pytorch.strategies", _register_strategy)
    when_imported("lightning.pytorch.cli", _import_what_files_name)


def _compile_nothing_without_cuda() -> None:
    """Without CUDA, compiling megatron-core's small functions at their first call is seconds of C++ for nothing."""
    import torch

    if not torch.cuda.device_count():  # unlike is_available, it lets processes be forked afterwards
        import_module("megatron.core.jit").disable_jit_fuser()


def _register_strategy() -> None:
    """Let ``Trainer(strategy="megatron")`` name the strategy."""
    registry = import_module("lightning.pytorch.strategies").StrategyRegistry
    if "megatron" not in registry:
        registry.register("megatron", _strategy, description="megatron-core's parallelism")


def _strategy(**arguments: Any) -> Any:
    return import_module("lightning_megatron.strategy.megatron_strategy").MegatronStrategy(**arguments)


_strategy.__name__ = "MegatronStrategy"  # by which error messages call it


def _import_what_files_name() -> None:
    for name in _NAMED_IN_FILES:
        module = import_module(f"lightning_megatron.{name}")
        for each in getattr(module, "__all__", ()):
            getattr(module, each)  # which imports it, where the folder imports its names at their first use
