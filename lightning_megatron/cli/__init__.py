"""The ``lightning-megatron`` command, and the migration of other tools' settings.

Imports ``distributed``, ``training``, ``data``, ``checkpoint``, ``hf``, ``models``, ``strategy`` and ``callbacks``.
"""

from typing import TYPE_CHECKING

from lightning_megatron.distributed.first_use import import_at_first_use

if TYPE_CHECKING:
    from lightning_megatron.cli.training import MegatronCLI

__all__ = ["MegatronCLI"]

__getattr__ = import_at_first_use(__name__, {"training": ["MegatronCLI"]})
