"""The Lightning side: ``MegatronStrategy``, its steps, logging and launchers, and all that it changes of a Trainer.

Imports ``distributed``, ``training``, ``checkpoint`` and ``models``.
"""

from lightning_megatron.strategy.megatron_strategy import MegatronStrategy

__all__ = ["MegatronStrategy"]
