"""Attention whose softmax has one more score, a head's sink, that takes a share of the probability and gives nothing.

A sink is a part of the keys whose value is zero and whose log-sum-exp is the sink itself, so that it is merged with the
keys as parts of them are, and all gradients follow from the merged result (Xiao and others, "Efficient Streaming
Language Models with Attention Sinks", 2023; learned for each head in GPT-OSS).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig

from lightning_megatron.models.layers.partial_attention import (
    Merged,
    add_gradients,
    attend_part,
    heads_first,
    part_gradients,
)
from lightning_megatron.models.layers.visible_blocks import Block, Visible


def new_sinks(config: TransformerConfig) -> torch.nn.Parameter:
    """A sink for each head of this rank, ``[heads/tp]``."""
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    device = torch.get_default_device()
    sinks = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype, device=device))
    if config.perform_initialization:
        config.init_method(sinks)
    set_tensor_model_parallel_attributes(sinks, is_parallel=True, dim=0, stride=1)
    return sinks


def attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    visible: Visible,
    scale: float | None,
) -> torch.Tensor:
    """Attention of ``query`` ``[s, b, heads, head]``, the last of which is at the last key; as ``query``.

    Args:
        query: The queries.
        key: The keys ``[k, b, groups, head]``.
        value: As ``key``.
        sinks: ``[heads]``, scores that are not multiplied by ``scale``.
        visible: Who looks at whom.
        scale: Factor on the other scores; None is one over the root of the head's size.
    """
    places = range(key.size(0))
    blocks = list(visible.blocks(places[len(places) - query.size(0) :], places))
    found: torch.Tensor = _WithSinks.apply(query, key, value, sinks, blocks, scale)  # type: ignore[no-untyped-call]
    return found


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor,
        blocks: list[Block],
        scale: float | None,
    ) -> torch.Tensor:
        merged = Merged(query, value.size(-1))
        merged.total[:] = sinks.to(merged.total.dtype)[:, None]
        for block in blocks:
            queries, keys = _slices(block, key.size(0) - query.size(0))
            q, k, v = heads_first(query[queries], key[keys], value[keys])
            merged.add(queries, *attend_part(q, k, v, block.seen, block.causal, scale))
        out = merged.out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, merged.total)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, sinks, out, total = ctx.saved_tensors
        of_query, of_key, of_value = (torch.zeros_like(x, dtype=total.dtype) for x in (query, key, value))
        for block in ctx.blocks:
            queries, keys = _slices(block, key.size(0) - query.size(0))
            gradient, q, o = heads_first(*(x[queries] for x in (gradients[0], query, out)))
            k, v = heads_first(key[keys], value[keys])
            found = part_gradients(gradient, q, k, v, o, total[..., queries], block.seen, block.causal, ctx.scale)
            add_gradients((of_query, of_key, of_value), queries, keys, found)
        share = (sinks[:, None] - total).exp()  # [b, heads, s]: the sink's probability
        given = (gradients[0].to(total.dtype) * out).sum(-1).permute(1, 2, 0)
        of_sinks = -(share * given).sum((0, 2))
        return (
            of_query.to(query.dtype),
            of_key.to(key.dtype),
            of_value.to(value.dtype),
            of_sinks.to(sinks.dtype),
            None,
            None,
        )


def _slices(block: Block, first: int) -> tuple[slice, slice]:
    """The block's queries, of which number 0 is at the place ``first``, and its keys."""
    return slice(block.queries.start - first, block.queries.stop - first), slice(block.keys.start, block.keys.stop)
