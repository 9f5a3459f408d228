"""LayerNorm and RMSNorm that work under sequence parallelism."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from megatron.core.transformer import TransformerConfig


class ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is counted from one, so that weight decay draws it there; Gemma's."""

    def reset_parameters(self) -> None:
        """Start with zeros, which is a factor of one."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        return torch.nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class ZeroCentredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose weight is counted from one."""

    def reset_parameters(self) -> None:
        """Start with zeros, which is a factor of one."""
        torch.nn.init.zeros_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        return torch.nn.functional.layer_norm(input, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


_NORMS: dict[tuple[str, bool], type[torch.nn.Module]] = {
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("LayerNorm", True): ZeroCentredLayerNorm,
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("RMSNorm", True): ZeroCentredRMSNorm,
}


class TorchNorm:
    """torch's norm for ``config.normalization``, its weights marked for sequence parallelism.

    Under sequence parallelism a rank normalises its part of the sequence only, so the weights' gradients are partial:
    megatron-core sums over the tensor-parallel group what carries the mark ``sequence_parallel``.
    """

    norms: ClassVar[dict[tuple[str, bool], type[torch.nn.Module]]] = _NORMS

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """Make the norm; megatron-core builds its layers by calling the class of the spec."""
        without = {} if getattr(config, "norm_bias", True) else {"bias": False}  # of a LayerNorm
        norm = cls.norms[config.normalization, config.layernorm_zero_centered_gamma](hidden_size, eps=eps, **without)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
