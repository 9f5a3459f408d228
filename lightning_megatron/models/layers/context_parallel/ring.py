"""Attention in a ring: keys and values go from rank to rank, and each adds what its queries find in them.

A rank holds its own shard and the one that passes, and keeps its own alone: in the backward pass keys and values go
round again, and with them their gradients, in fp32, until these are back where they belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models.layers.partial_attention import (
    Merged,
    add_gradients,
    attend_part,
    heads_first,
    part_gradients,
)
from lightning_megatron.models.layers.visible_blocks import Visible


def attend_in_ring(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: Visible,
    shards: tuple[SequenceShards, SequenceShards],
    scale: float | None,
    cap: float | None = None,
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        query: ``[s/cp, b, heads, head]``.
        key: ``[s/cp, b, groups, head]``.
        value: As ``key``, with heads of any size.
        visible: Who looks at whom in whole rows.
        shards: Which places of the queries, and of the keys, the ranks hold.
        scale: Factor on the scores; None is one over the root of the head's size.
        cap: What no score is beyond, see ``capped_attention``; None: there is no cap.

    Returns:
        As ``query``, with heads of the values' size.
    """
    found: torch.Tensor = _Ring.apply(query, key, value, visible, shards, scale, cap)  # type: ignore[no-untyped-call]
    return found


class _Call(NamedTuple):
    """One call of a kernel: places in this rank's shard of queries and in a shard of keys."""

    queries: slice
    keys: slice
    seen: torch.Tensor | None
    causal: bool


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: Visible,
        shards: tuple[SequenceShards, SequenceShards],
        scale: float | None,
        cap: float | None,
    ) -> torch.Tensor:
        merged, ranks, passing = Merged(query, value.size(-1)), shards[1].size, torch.cat((key, value), dim=-1)
        for step in range(ranks):
            following = _Message(passing, step) if step + 1 < ranks else None
            k, v = passing.split([key.size(-1), value.size(-1)], dim=-1)
            for call in _calls(visible, shards, step, query.size(0), key.size(0)):
                q_part, k_part, v_part = heads_first(query[call.queries], k[call.keys], v[call.keys])
                part = attend_part(q_part, k_part, v_part, call.seen, call.causal, scale, cap)
                merged.add(call.queries, *part)
            if following is not None:
                passing = following.received()
        out = merged.out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, merged.finite_total())
        ctx.visible, ctx.shards, ctx.scores = visible, shards, (scale, cap)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, out, total = ctx.saved_tensors
        ranks, passing = ctx.shards[1].size, torch.cat((key, value), dim=-1)
        of_query = torch.zeros_like(query, dtype=total.dtype, memory_format=torch.contiguous_format)
        on_the_way: _Message | None = None  # the gradients of the keys that pass, from the ranks before
        for step in range(ranks):
            following = _Message(passing, 2 * step) if step + 1 < ranks else None
            k, v = passing.split([key.size(-1), value.size(-1)], dim=-1)
            added = torch.zeros_like(passing, dtype=total.dtype)
            of_key, of_value = added.split([key.size(-1), value.size(-1)], dim=-1)
            for call in _calls(ctx.visible, ctx.shards, step, query.size(0), key.size(0)):
                gradient, q_part, of_all = heads_first(*(x[call.queries] for x in (gradients[0], query, out)))
                k_part, v_part = heads_first(k[call.keys], v[call.keys])
                totals = total[..., call.queries]
                found = part_gradients(
                    gradient, q_part, k_part, v_part, of_all, totals, call.seen, call.causal, *ctx.scores
                )
                add_gradients((of_query, of_key, of_value), call.queries, call.keys, found)
            if on_the_way is not None:
                added += on_the_way.received()
            on_the_way = _Message(added, 2 * step + 1)
            if following is not None:
                passing = following.received()
        assert on_the_way is not None
        of_keys = on_the_way.received()  # of this rank's own: they have been all the way round
        of_key, of_value = of_keys.to(key.dtype).split([key.size(-1), value.size(-1)], dim=-1)
        return of_query.to(query.dtype), of_key, of_value, None, None, None, None


class _Message:
    """A tensor on its way to the next rank of the ring, while the one from the rank before comes.

    Over Gloo, two messages between the same ranks are told apart by ``tag``.
    """

    def __init__(self, sent: torch.Tensor, tag: int) -> None:
        group = process_groups.context_parallel()
        rank, ranks = group.rank(), group.size()
        self._sent, self._arriving = sent.contiguous(), torch.empty_like(sent, memory_format=torch.contiguous_format)
        following, before = (dist.get_global_rank(group, number % ranks) for number in (rank + 1, rank - 1))
        self._requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, following, group, tag),
                dist.P2POp(dist.irecv, self._arriving, before, group, tag),
            ]
        )

    def received(self) -> torch.Tensor:
        """What the rank before has sent, once it is there, and this rank's own message is gone."""
        for request in self._requests:
            request.wait()
        return self._arriving


def _calls(
    visible: Visible, shards: tuple[SequenceShards, SequenceShards], step: int, queries: int, keys: int
) -> Iterator[_Call]:
    """The kernel's calls for the keys that are here at ``step``: at first this rank's, then that of the one before."""
    of_queries, of_keys = shards
    owner = (of_keys.rank - step) % of_keys.size
    own, theirs = of_queries.parts(queries * of_queries.size), of_keys.parts(keys * of_keys.size, owner)
    for number, part in enumerate(own):
        for other, key_part in enumerate(theirs):
            for block in visible.blocks(part, key_part):
                yield _Call(
                    _within(block.queries, part, number), _within(block.keys, key_part, other), block.seen, block.causal
                )


def _within(places: range, part: range, number: int) -> slice:
    """Where ``places`` of a row, which lie in the shard's part ``number``, are in the shard."""
    first = places.start - part.start + number * len(part)
    return slice(first, first + len(places))
