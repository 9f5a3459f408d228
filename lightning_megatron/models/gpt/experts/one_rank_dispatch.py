"""``OneRankDispatcher``: sorts tokens by expert on a rank that has all experts, without a question to the host."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher


class OneRankDispatcher(MoETokenDispatcher):
    """Takes the place of megatron-core's dispatchers where a rank shares no experts and no token is dropped.

    It runs no shared experts beside the dispatch, as megatron-core's do with ``moe_shared_expert_overlap``.

    megatron-core's sort the tokens twice, and wait for a GPU to say how many each expert has. Here all sizes are known
    before: each token has ``top_k`` copies. In both passes rows are read where they stand and added in one order, so
    that a step on a GPU repeats to the bit.

    Args:
        config: megatron-core's configuration.
        pg_collection: megatron-core's process groups.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any) -> None:
        super().__init__(config, pg_collection)
        self._copies = config.moe_router_topk

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of each token for each of its experts, sorted by expert, and the copies' weights.

        Args:
            tokens: ``[s, b, h]``.
            routing_map: Which experts each token has, ``[tokens, experts]``; as many for each.
            probs: Their weights, ``[tokens, experts]``.
        """
        self._shape = tokens.shape
        numbers = torch.arange(1, probs.size(1) + 1, device=probs.device)
        experts = (routing_map * numbers).topk(self._copies, dim=1).indices  # no two are equal: always in this order
        order = experts.flatten().argsort(stable=True)
        self._sources = order // self._copies
        self._places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        self._places = self._places.view(-1, self._copies)
        self._tokens_per_expert = routing_map.sum(0)
        copies = _Copies.apply(tokens.flatten(0, -2), self._sources, self._places)  # type: ignore[no-untyped-call]
        return copies, probs.gather(1, experts).flatten().index_select(0, order)

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The copies as they are: no other rank has experts for them."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The copies, how many each expert has, and their weights."""
        return hidden_states, self._tokens_per_expert, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sum of what the experts have made of each token, ``[tokens, h]``."""
        summed: torch.Tensor = _Sums.apply(hidden_states, self._sources, self._places)  # type: ignore[no-untyped-call]
        return summed

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sums as they are."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sums, ``[s, b, h]``."""
        return hidden_states.view(self._shape)


class _Copies(torch.autograd.Function):
    """Row ``sources[i]`` of the tokens for each ``i``; token ``t`` stands in the rows ``places[t]``."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return tokens.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return F.embedding_bag(places, gradient, mode="sum"), None, None


class _Sums(torch.autograd.Function):
    """The sum of the rows ``places[t]`` for each token ``t``; row ``i`` goes into token ``sources[i]``."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(sources)
        return F.embedding_bag(places, rows, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (sources,) = ctx.saved_tensors
        return gradient.index_select(0, sources), None, None
