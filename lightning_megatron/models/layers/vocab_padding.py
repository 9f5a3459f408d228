"""Keeps the padding of a vocabulary out of the softmax, and computes the loss over the vocabulary's shards."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
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
        output_layer.register_forward_hook(partial(_mask, real, shard))


def cross_entropy_over_shards(
    logits: torch.Tensor, labels: torch.Tensor, ignored: int, number: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropy of the tokens that have a label, and their number.

    Args:
        logits: ``[b, s, vocab/tp]``; kept: megatron-core writes over what it is given, here a copy of the counted rows.
        labels: ``[b, s]``.
        ignored: The label of tokens that are not counted.
        number: How many are counted, where the host knows it; None waits for the device, which counts them.
    """
    counted = labels != ignored
    places = counted.nonzero() if number is None else torch.nonzero_static(counted, size=number)  # [n, 2]
    rows, tokens = places.unbind(1)
    losses = vocab_parallel_cross_entropy(logits[rows, tokens], labels[rows, tokens])  # [n]
    return losses.float().sum(), counted.sum()


def _mask(
    real: int, shard: int, _: torch.nn.Module, __: Any, output: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor, Any]:
    logits, bias = output  # [s, b, vocab/tp]
    if logits.size(-1) != shard:
        return output  # gathered, in generation, where the padding is cut off
    padding = torch.arange(logits.size(-1), device=logits.device) >= real
    return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias
