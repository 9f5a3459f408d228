"""Scales rotary frequencies for long sequences by transformers' formulas, and moves them with the model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


def stretch_rotary(model: torch.nn.Module, base: float, share: float, seq_length: int, scaling: dict[str, Any]) -> None:
    """Give a model other rotary frequencies, but for those of a ``WindowRotary`` that layers with a window have.

    YaRN's factor on queries and keys becomes one on the scores, where the whole head is rotated; of multi-latent
    attention it stays one on the channels that are.

    Args:
        model: A ``PositionedGPT`` or ``BertModel``.
        base: Base period of the rotary frequencies.
        share: Share of a head's channels that is rotated.
        seq_length: Longest sequence, in tokens.
        scaling: transformers' ``rope_parameters``.

    Raises:
        ValueError: YaRN on part of a head.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config: Any = model.config
    parameters = {**scaling, "rope_theta": base, "partial_rotary_factor": share}
    theirs = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.kv_channels,
        max_position_embeddings=seq_length,
        rope_parameters=parameters,
    )
    rotary: Any = model.rotary_pos_emb
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, rotary.inv_freq.device)
    rotary.inv_freq = frequencies
    if factor == 1.0:
        return
    if share != 1.0:
        raise ValueError(f"rope_scaling={scaling} changes the size of queries and keys; use rotary_percent=1.0.")
    if hasattr(config, "latent_attention"):
        for module in model.modules():
            if hasattr(module, "rotary_factor"):
                module.rotary_factor = factor
        return
    for layer in model.transformer_layers:  # type: ignore[union-attr]
        attention: Any = layer.self_attention.core_attention
        if not getattr(layer.self_attention, "rotary_table", 0):
            attention.softmax_scale = factor**2 * (attention.softmax_scale or config.kv_channels**-0.5)


def move_rotary(model: torch.nn.Module) -> None:
    """Have a model's rotary frequencies follow its weights to another device.

    megatron-core holds them beside the buffers, and remembers the angles that it has computed on the old device.
    """
    rotaries = [module for module in model.modules() if isinstance(module, RotaryEmbedding)]
    place = next((parameter.device for parameter in model.parameters()), None)
    for rotary in rotaries:
        if place is not None and rotary.inv_freq.device != place:
            rotary.inv_freq = rotary.inv_freq.to(place)
            RotaryEmbedding.forward.cache_clear()
