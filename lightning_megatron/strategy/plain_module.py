"""Makes a plain LightningModule the model chunk that the engine runs, and checks what its ``training_step`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.utilities.exceptions import MisconfigurationException
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
        """Do nothing: there is no earlier stage."""


def check_output(output: Any) -> None:
    """Refuse an output of ``training_step`` that Lightning refuses too; None is refused by the caller.

    Raises:
        MisconfigurationException: It is not a loss of one number.
        RuntimeError: The loss does not require a gradient.
    """
    try:
        ClosureResult.from_training_step_output(output)
    except MisconfigurationException as error:
        what = (
            f"a dict with {sorted(map(str, output))}" if isinstance(output, Mapping) else f"a {type(output).__name__}"
        )
        raise MisconfigurationException(
            f"{error} Here training_step returned {what}. Return the loss, a tensor, or a dict with the key 'loss'."
        ) from error
    loss = output["loss"] if isinstance(output, Mapping) else output
    if loss is None:
        return
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise RuntimeError(
            "training_step returned a loss that does not require grad: nothing would be learned from it. Leave out"
            " .detach() and torch.no_grad() on its way from the parameters."
        )
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"training_step returned a loss of shape {list(loss.shape)}. Return one number, such as loss.mean()."
        )
