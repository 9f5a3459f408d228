"""The adapters: LightningModules that build a model, make its batches and compute its loss."""

from lightning_megatron.modules.base import MegatronModule
from lightning_megatron.modules.gpt import GPTModule
from lightning_megatron.modules.gpt_config import GPTConfig

__all__ = ["GPTConfig", "GPTModule", "MegatronModule"]
