"""What people watch a run by. Each callback logs through ``self.log``, so that every logger shows it."""

from lightning_megatron.callbacks.perplexity import Perplexity

__all__ = ["Perplexity"]
