"""Attention whose scores are capped by a hyperbolic tangent, ``cap · tanh(score / cap)``, as in Gemma 2.

torch's kernels have no such cap. Scores are made for a block of queries at a time, and again in the backward pass, so
that those of all queries and keys are kept nowhere; with dropout of attention weights they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

_BLOCK = 512  # queries whose scores exist at once


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    *,
    cap: float,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """Attention of ``query`` ``[b, heads, s, head]`` to ``key`` and ``value`` ``[b, groups, s, head]``.

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        mask: As torch has it: True where a query looks, or numbers that are added to the capped scores.
        causal: Whether no query looks ahead, the last of which is at the last key; then there is no mask.
        cap: What no score is beyond.
        dropout: Probability.
        scale: Factor on the scores; None is one over the root of the head's size.
    """
    if not dropout:
        found: torch.Tensor = _Capped.apply(query, key, value, mask, causal, cap, scale)  # type: ignore[no-untyped-call]
        return found
    tanh = _tanh(_by_group(query, key), key, cap, scale)
    weights = _hidden(tanh * cap, mask, causal, slice(None), key.size(2) - query.size(2)).softmax(dim=-1)
    return (F.dropout(weights, dropout).to(value.dtype) @ value.unsqueeze(2)).flatten(1, 2)


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    cap: float,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``partial_attention.attend_part``, with a cap: attention to these keys alone, and its log-sum-exp."""
    outs, totals, ahead = [], [], key.size(2) - query.size(2)
    for block, keys in _blocks(query, key, causal):
        k, v = key[:, :, keys], value[:, :, keys]
        tanh = _tanh(_by_group(query[:, :, block], key), k, cap, scale)
        scores = _hidden(tanh.mul_(cap), seen, causal, block, ahead)
        total = scores.logsumexp(dim=-1, keepdim=True)
        weights = scores.sub_(finite(total)).exp_()
        outs.append((weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2))
        totals.append(total.flatten(1, 2)[..., 0])
    return torch.cat(outs, dim=2), torch.cat(totals, dim=2)


def part_gradients(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    cap: float,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``partial_attention.part_gradients``, with a cap."""
    of_query = torch.empty_like(query)
    of_key, of_value = (torch.zeros_like(x, dtype=total.dtype) for x in (key, value))
    ahead, factor = key.size(2) - query.size(2), query.size(-1) ** -0.5 if scale is None else scale
    for block, keys in _blocks(query, key, causal):
        q, given, result = (_by_group(x[:, :, block], key) for x in (query, gradient, out))
        k, v = key[:, :, keys], value[:, :, keys]
        tanh = _tanh(q, k, cap, scale)
        totals = _by_group(total[:, :, block, None], key)
        weights = _hidden(tanh * cap, seen, causal, block, ahead).sub_(totals).exp_()
        of_value[:, :, keys] += (weights.to(v.dtype).transpose(-2, -1) @ given).sum(2)
        drift = (given * result).sum(-1, keepdim=True, dtype=total.dtype)
        of_scores = (given @ v.unsqueeze(2).transpose(-2, -1)).to(total.dtype).sub_(drift).mul_(weights)
        of_scores = of_scores.mul_(1 - tanh.square_()).mul_(factor).to(q.dtype)  # the derivative of the cap
        of_query[:, :, block] = (of_scores @ k.unsqueeze(2)).flatten(1, 2)
        of_key[:, :, keys] += (of_scores.transpose(-2, -1) @ q).sum(2)
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


class _Capped(torch.autograd.Function):
    """Keeps the result and the log-sum-exp of each query's scores."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        cap: float,
        scale: float | None,
    ) -> torch.Tensor:
        out, total = attend_part(query, key, value, mask, causal, cap, scale)
        ctx.save_for_backward(query, key, value, mask, out, finite(total))
        ctx.settings = causal, cap, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, mask, out, total = ctx.saved_tensors
        found = part_gradients(gradients[0], query, key, value, out, total, mask, *ctx.settings)
        return *found, None, None, None, None


def _blocks(query: torch.Tensor, key: torch.Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Places of some queries, and of the keys that they may look at."""
    count, ahead = query.size(2), key.size(2) - query.size(2)
    for first in range(0, count, _BLOCK):
        last = min(first + _BLOCK, count)
        yield slice(first, last), slice(0, last + ahead if causal else key.size(2))


def _by_group(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``[b, groups, heads of a group, s, ...]`` of ``[b, heads, s, ...]``."""
    return x.unflatten(1, (key.size(1), -1))


def _tanh(query: torch.Tensor, key: torch.Tensor, cap: float, scale: float | None) -> torch.Tensor:
    """``[b, groups, heads of a group, queries, keys]``, the scores' share of the cap."""
    factor = query.size(-1) ** -0.5 if scale is None else scale
    scores = query @ key.unsqueeze(2).transpose(-2, -1)
    return (scores.to(torch.promote_types(scores.dtype, torch.float32)) * (factor / cap)).tanh()


def _hidden(scores: torch.Tensor, mask: torch.Tensor | None, causal: bool, queries: slice, ahead: int) -> torch.Tensor:
    """The scores of some queries, −inf where they do not look; ``ahead`` keys lie before the first of all queries."""
    if causal:
        first, (count, keys) = (queries.start or 0) + ahead, scores.shape[-2:]
        looks = torch.ones(count, keys, dtype=torch.bool, device=scores.device).tril(first)
        return scores.masked_fill(~looks, float("-inf"))
    if mask is None:
        return scores
    while mask.dim() < 4:
        mask = mask[None]
    mask = mask[:, :, queries] if mask.size(2) > 1 else mask
    mask = mask.unsqueeze(2) if mask.size(1) == 1 else mask.unflatten(1, (scores.size(1), -1))
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def finite(total: torch.Tensor) -> torch.Tensor:
    """A log-sum-exp, 0 where a query looks nowhere: all its probabilities are then 0."""
    return total.masked_fill(total == float("-inf"), 0.0)
