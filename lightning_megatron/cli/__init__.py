"""The ``lightning-megatron`` command, and the migration of other tools' settings.

Imports ``distributed``, ``training``, ``data``, ``checkpoint``, ``hf``, ``models``, ``strategy`` and ``callbacks``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_megatron.cli.training import MegatronCLI

__all__ = ["MegatronCLI"]


def __getattr__(name: str) -> Any:  # the command's parts that are light do not wait for Lightning
    if name == "MegatronCLI":
        from lightning_megatron.cli.training import MegatronCLI

        return MegatronCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
