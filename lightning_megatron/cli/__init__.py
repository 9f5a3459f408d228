"""The ``lightning-megatron`` command, and the migration of other tools' settings.

Imports everything below it.
"""

from lightning_megatron.cli.training import MegatronCLI

__all__ = ["MegatronCLI"]
