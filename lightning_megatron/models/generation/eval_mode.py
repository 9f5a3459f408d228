"""Puts a model that is in training into evaluation mode for a while, and restores it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from lightning_megatron.models.layers.attention import TorchAttention

# megatron-core's layers read these attributes on each call, and take no argument for them. A sequence of one token
# cannot be divided over the tensor-parallel ranks.
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def prepared_to_generate(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Turn off gradients, dropout, sequence and context parallelism, and on exit turn on again what was on.

    ``inference_mode`` is not used: tensors that megatron-core keeps there (rotary angles) break a later training step.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    training = [module for module in modules if module.training]
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    shared = [
        (owner, name)
        for owner in (*modules, *configs.values())
        for name in _SEQUENCE_PARALLEL
        if vars(owner).get(name) is True
    ]
    try:
        for module in training:
            module.training = False
        for owner, name in shared:
            setattr(owner, name, False)
        with torch.no_grad(), _whole_rows_on_each_rank(modules):
            yield
    finally:
        for module in training:
            module.training = True
        for owner, name in shared:
            setattr(owner, name, True)


@contextmanager
def _whole_rows_on_each_rank(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Have ranks that share rows in training compute whole texts, each for itself: one token cannot be divided."""
    attentions = [module for module in modules if isinstance(module, TorchAttention) and module.way is not None]
    rotaries = [module for module in modules if isinstance(module, RotaryEmbedding)] if attentions else []
    groups = [rotary.cp_group for rotary in rotaries]
    try:
        for attention in attentions:
            attention.has_whole_rows = True
        for rotary in rotaries:
            rotary.cp_group = None
        if rotaries:
            RotaryEmbedding.forward.cache_clear()  # it remembers the angles of a rank's part
        yield
    finally:
        for attention in attentions:
            attention.has_whole_rows = False
        for rotary, group in zip(rotaries, groups, strict=True):
            rotary.cp_group = group
        if rotaries:
            RotaryEmbedding.forward.cache_clear()
