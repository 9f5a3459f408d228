"""LayerNorm and RMSNorm that work under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class TorchNorm:
    """torch's norm for ``config.normalization``, its weights marked for sequence parallelism.

    Under sequence parallelism a rank normalises its part of the sequence only, so the weights' gradients are partial:
    megatron-core sums over the tensor-parallel group what carries the mark ``sequence_parallel``.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """Make the norm; megatron-core builds its layers by calling the class of the spec."""
        norm = _NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
