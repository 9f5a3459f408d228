"""The Lightning side: ``MegatronStrategy``, its steps, logging and launchers, and all that it changes of a Trainer.

Imports ``distributed``, ``training``, ``checkpoint`` and ``models``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_megatron.strategy.megatron_strategy import MegatronStrategy

__all__ = ["MegatronStrategy"]


def __getattr__(name: str) -> Any:  # what is light in this folder does not wait for Lightning
    if name == "MegatronStrategy":
        from lightning_megatron.strategy.megatron_strategy import MegatronStrategy

        return MegatronStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
