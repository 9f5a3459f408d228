"""Low-rank updates of a model's linear layers (LoRA)."""

from lightning_megatron.models.lora.config import LoRA

__all__ = ["LoRA"]
