"""A model that is being trained, lent out for a while and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

# Of megatron-core's layers; a single token cannot be shared out over the sequence.
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def lent(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Without gradients, dropout and sequence parallelism.

    ``inference_mode`` is not used: tensors that megatron-core keeps there (rotary angles) break a later training step.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    training = [(module, module.training) for module in modules]
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    shared = [
        (owner, name)
        for owner in (*modules, *configs.values())
        for name in _SEQUENCE_PARALLEL
        if vars(owner).get(name) is True
    ]
    try:
        for module, _ in training:
            module.training = False
        for owner, name in shared:
            setattr(owner, name, False)
        with torch.no_grad():
            yield
    finally:
        for module, was in training:
            module.training = was
        for owner, name in shared:
            setattr(owner, name, True)
