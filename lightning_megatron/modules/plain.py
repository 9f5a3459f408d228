"""A LightningModule with no Megatron in it, as a model chunk."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig


class PlainModel(torch.nn.Module):
    """A plain LightningModule as the only model chunk of a schedule without pipeline stages."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module
        # The schedules ask a transformer's configuration for switches that are all off here; the sizes are not read.
        self.config = TransformerConfig(
            num_layers=1, hidden_size=1, num_attention_heads=1, calculate_per_token_loss=True
        )
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, _: Any) -> None:
        """Nothing comes from an earlier stage."""
