"""The layers of a head, which every tensor-parallel rank computes alike, and the hidden states that it reads."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.collectives import sum_with_gradients
from lightning_megatron.distributed.sequence_shards import SequenceShards


def label_layer(config: TransformerConfig, outputs: int, bias: bool = True) -> torch.nn.Linear:
    """A linear layer of a head, the same on every tensor-parallel rank; it starts as transformers' do.

    Args:
        config: Megatron's transformer configuration.
        outputs: Width of its output.
        bias: Whether it has a bias, which starts at 0.
    """
    device = torch.get_default_device()
    layer = torch.nn.Linear(config.hidden_size, outputs, bias=bias, device=device, dtype=config.params_dtype)
    if config.perform_initialization:
        config.init_method(layer.weight)
    if bias:
        torch.nn.init.zeros_(layer.bias)
    return layer


def whole_sequence(config: TransformerConfig, hidden: torch.Tensor) -> torch.Tensor:
    """``[s, b, h]`` of ``[s/tp, b, h]``, for a head that every tensor-parallel rank computes alike."""
    if not config.sequence_parallel:
        return hidden
    return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)


def states_at(config: TransformerConfig, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The hidden states of one token of each row, ``[b, h]``, on every rank that has a part of the row.

    A rank gives what it holds, and zeros for rows whose token is on another; the sum over them is sent, not the row.

    Args:
        config: Megatron's transformer configuration.
        hidden: ``[s/(tp·cp), b, h]``, zig-zag over context-parallel ranks.
        places: ``[b]``, the token's place in its whole row.
    """
    tensor, context = process_groups.tensor_parallel(), process_groups.context_parallel()
    divided = tensor if config.sequence_parallel else None
    length = hidden.size(0) * context.size() * (divided.size() if divided else 1)
    held = torch.arange(length, device=hidden.device)
    if context.size() > 1:
        held = SequenceShards.here(zigzag=True).take(held, 0)
    if divided:
        held = held.chunk(divided.size())[divided.rank()]
    found = held[:, None] == places  # [s/(tp·cp), b], one place or none in each column
    mine = hidden[found.int().argmax(dim=0), torch.arange(hidden.size(1), device=hidden.device)]
    states = torch.where(found.any(dim=0)[:, None], mine, 0.0)
    if divided:
        states = reduce_from_tensor_model_parallel_region(states)
    return sum_with_gradients(states, context) if context.size() > 1 else states
