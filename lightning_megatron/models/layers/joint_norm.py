"""An RMSNorm over all heads of queries or of keys together, of which each tensor-parallel rank has some."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig

from lightning_megatron.distributed import process_groups


class JointNorm(torch.nn.Module):
    """RMSNorm of a token's queries, as in OLMo 2; megatron-core builds it where its own norm is over one head.

    Each rank holds the whole weight ``[all heads · head]`` and uses the part of its heads, so that its gradient is
    zero elsewhere: megatron-core sums it over the tensor-parallel ranks, as of every norm of queries and keys.

    Args:
        config: Megatron's transformer configuration.
        hidden_size: Channels of a head.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads, self.size, self.eps = self._heads(config), hidden_size, eps
        self.group = process_groups.tensor_parallel()
        self.weight = torch.nn.Parameter(torch.ones(self.heads * hidden_size, device=torch.get_default_device()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[s, b, heads of this rank, head]``."""
        wide, ranks = x.float(), self.group.size()
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)  # [s, b, 1, 1]
        if ranks > 1:
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        here = x.size(-2)
        counted = here * ranks * self.size  # more than there are, where ranks have the same head of keys
        first = self.group.rank() * self.heads // ranks
        weight = self.weight.view(self.heads, self.size)[first : first + here]
        return (wide * torch.rsqrt(squares / counted + self.eps) * weight).to(x.dtype)

    def _heads(self, config: TransformerConfig) -> int:
        return config.num_attention_heads


class JointKeyNorm(JointNorm):
    """As ``JointNorm``, of a token's keys."""

    def _heads(self, config: TransformerConfig) -> int:
        assert config.num_query_groups is not None
        return config.num_query_groups
