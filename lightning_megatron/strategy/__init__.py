"""The Lightning side: ``MegatronStrategy``, its steps, logging and launchers, and all that it changes of a Trainer.

Imports ``distributed``, ``training``, ``checkpoint`` and ``models``.
"""

from typing import TYPE_CHECKING

from lightning_megatron.distributed.first_use import import_at_first_use

if TYPE_CHECKING:
    from lightning_megatron.strategy.megatron_strategy import MegatronStrategy

__all__ = ["MegatronStrategy"]

__getattr__ = import_at_first_use(__name__, {"megatron_strategy": ["MegatronStrategy"]})
