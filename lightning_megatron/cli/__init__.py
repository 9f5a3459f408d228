"""The ``lightning-megatron`` command, and the migration of other tools' settings.

Imports ``distributed``, ``training``, ``data``, ``checkpoint``, ``hf``, ``models``, ``strategy`` and ``callbacks``.
"""

from lightning_megatron.cli.training import MegatronCLI

__all__ = ["MegatronCLI"]
