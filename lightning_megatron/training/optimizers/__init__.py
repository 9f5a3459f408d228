"""Optimizers that torch does not have, or not for weights that are divided between ranks."""

from lightning_megatron.training.optimizers.lean_adamw import LeanAdamW
from lightning_megatron.training.optimizers.muon import Muon

__all__ = ["LeanAdamW", "Muon"]
