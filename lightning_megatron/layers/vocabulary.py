"""The rows that pad a vocabulary for tensor parallelism, kept out of the softmax."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.utils import VocabUtility


def mask_padded_vocabulary(output_layer: ColumnParallelLinear, vocab_size: int) -> None:
    """Make the logits of ids from ``vocab_size`` on so small that they have no probability and no gradient.

    Megatron lets them take part, so that a vocabulary that does not divide trains a little differently for each
    tensor-parallel size; here every layout trains the same model. Costs nothing on ranks without padding.

    Args:
        output_layer: megatron-core's vocabulary-parallel output layer.
        vocab_size: Token ids that occur.
    """
    shard = output_layer.output_size_per_partition
    first, _ = VocabUtility.vocab_range_from_per_partition_vocab_size(
        shard, output_layer.tp_group.rank(), output_layer.tp_group.size()
    )
    real = min(max(vocab_size - first, 0), shard)
    if real < shard:
        output_layer.register_forward_hook(partial(_mask, real))


def _mask(real: int, _: torch.nn.Module, __: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    logits, bias = output  # [s, b, vocab/tp]
    padding = torch.arange(logits.size(-1), device=logits.device) >= real
    return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias
