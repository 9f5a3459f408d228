"""Translates the settings of other tools into a run of ``lightning-megatron fit`` that does the same.

Each source (an Accelerate configuration, its ``MegatronLMPlugin``, Megatron-LM's command line) becomes Megatron's own
names and values; one table says where each of those lives here.
"""

from lightning_megatron.cli.migrate.accelerate import from_accelerate, from_plugin
from lightning_megatron.cli.migrate.megatron_lm import from_command_line
from lightning_megatron.cli.migrate.plan import Line, MigrationError, Plan

__all__ = ["Line", "MigrationError", "Plan", "from_accelerate", "from_command_line", "from_plugin"]
