"""Attention to some of the keys, its log-sum-exp, by which such parts are merged into one, and the parts' gradients.

Scores are made block by block by torch's kernels and are kept nowhere. A part's gradients come from the merged result
and its log-sum-exp: then the probabilities, which a kernel makes anew, are those among all keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron.models.layers import capped_attention
from lightning_megatron.models.layers.equal_heads import equal_heads, widened

Tensors = tuple[torch.Tensor, ...]

_aten = torch.ops.aten
_LANES = 32  # the efficient kernel pads the log-sum-exp to a multiple of this
_ALIGNED = 16  # and takes masks whose rows lie this many numbers apart, or a multiple


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries to these keys alone.

    Args:
        query: ``[b, heads, q, head]``.
        key: ``[b, groups, k, head]``.
        value: As ``key``, with heads of any size.
        seen: ``[b or 1, 1, q or 1, k]``, whether a query looks at a key; None: at all of them.
        causal: Whether query and key of one number are one token, and none looks ahead; then there is no ``seen``.
        scale: Factor on the scores; None is one over the root of the head's size.
        cap: What no score is beyond, see ``capped_attention``; None: there is no cap.

    Returns:
        ``[b, heads, q, head]`` with heads of the values' size, and the log-sum-exp of the scores ``[b, heads, q]`` in
        fp32. Where a query looks at no key, these are 0 and -inf.
    """
    if cap is not None:
        return capped_attention.attend_part(query, key, value, seen, causal, cap, scale)
    width = value.size(-1)
    (query, key, value), scale = equal_heads(query, key, value, scale)
    if query.device.type == "cpu":
        mask = _added(seen, query)
        out, total = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
    elif _takes_flash(query, seen):
        out, total, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    else:
        times, mask = query.size(1) // key.size(1), _aligned(seen, query, key)
        key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
        out, total, *_ = _aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, 0.0, causal, scale=scale
        )
        total = total[..., : query.size(2)]
    if seen is not None:
        blind = ~seen.any(dim=-1)  # [b or 1, 1, q or 1]; what kernels return there differs
        out, total = out.masked_fill(blind[..., None], 0.0), total.masked_fill(blind, float("-inf"))
    return out[..., :width], total


def part_gradients(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a part adds to the gradients of its queries, keys and values.

    Args:
        gradient: That of the merged result, ``[b, heads, q, head]``.
        query: As ``attend_part`` was given it, as ``key``, ``value``, ``seen``, ``causal`` and ``scale``.
        key: The keys.
        value: The values.
        out: The merged result of all parts.
        total: Its log-sum-exp, finite everywhere.
        seen: Whether a query looks at a key.
        causal: Whether no query looks ahead.
        scale: Factor on the scores.
        cap: What no score is beyond.
    """
    if cap is not None:
        return capped_attention.part_gradients(gradient, query, key, value, out, total, seen, causal, cap, scale)
    if query.size(-1) != value.size(-1):
        widths = [x.size(-1) for x in (query, key, value)]
        (query, key, value), scale = equal_heads(query, key, value, scale)
        gradient, out = (widened(x, query.size(-1)) for x in (gradient, out))
        wide = part_gradients(gradient, query, key, value, out, total, seen, causal, scale)
        of_query, of_key, of_value = (x[..., :width] for x, width in zip(wide, widths, strict=True))
        return of_query, of_key, of_value
    if query.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, out, total, 0.0, causal, attn_mask=_added(seen, query), scale=scale
        )
    total = total.contiguous()
    if _takes_flash(query, seen):
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the random state of dropout
        q, k = query.size(2), key.size(2)
        return _aten._scaled_dot_product_flash_attention_backward(
            gradient, query, key, value, out, total, None, None, q, k, 0.0, causal, unused, unused[0], scale=scale
        )
    groups, times = key.size(1), query.size(1) // key.size(1)
    mask = _aligned(seen, query, key)
    key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    total = F.pad(total, (0, -total.size(-1) % _LANES))
    unused = torch.zeros((), dtype=torch.int64, device=query.device)
    of_query, of_key, of_value, _ = _aten._scaled_dot_product_efficient_attention_backward(
        gradient,
        query,
        key,
        value,
        mask,
        out,
        total,
        unused,
        unused,
        0.0,
        [True, True, True, False],
        causal,
        scale=scale,
    )
    of_key, of_value = (x.unflatten(1, (groups, times)).sum(2) for x in (of_key, of_value))
    return of_query, of_key, of_value


def heads_first(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """``[b, heads, places, head]`` of each of ``[places, b, heads, head]``."""
    return (x.permute(1, 2, 0, 3) for x in tensors)


def add_gradients(sums: Tensors, queries: slice, keys: slice, found: Tensors) -> None:
    """Add what ``part_gradients`` found to the gradients of rows ``[s, b, heads, head]``.

    Args:
        sums: Those of queries, keys and values.
        queries: The places of the part's queries.
        keys: Those of its keys.
        found: The part's gradients.
    """
    for whole, places, part in zip(sums, (queries, keys, keys), found, strict=True):
        whole[places] += part.permute(2, 0, 1, 3)


class Merged:
    """The attention of queries ``[q, b, heads, head]`` to all parts of the keys that were added.

    Args:
        query: The queries.
        width: Size of a value's head.

    Attributes:
        out: ``[q, b, heads, width]``, in fp32.
        total: The log-sum-exp ``[b, heads, q]``.
    """

    def __init__(self, query: torch.Tensor, width: int) -> None:
        q, b, heads, _ = query.shape
        exact = torch.promote_types(query.dtype, torch.float32)
        self.out = torch.zeros(q, b, heads, width, dtype=exact, device=query.device)
        self.total = torch.full((b, heads, q), float("-inf"), dtype=exact, device=query.device)

    def add(self, queries: slice, out: torch.Tensor, total: torch.Tensor) -> None:
        """Merge what ``attend_part`` returned for some of the queries."""
        before = self.total[..., queries]
        after = torch.logaddexp(before, total)
        safe = capped_attention.finite(after)
        old, new = ((x - safe).exp().permute(2, 0, 1)[..., None] for x in (before, total))  # [q, b, heads, 1]
        self.out[queries].mul_(old).add_(out.permute(2, 0, 1, 3) * new)
        self.total[..., queries] = after

    def finite_total(self) -> torch.Tensor:
        """``total``, 0 where a query looks nowhere: all its probabilities are then 0."""
        return capped_attention.finite(self.total)


def attend_behind(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Causal attention of ``[b, heads, q, head]``, whose last query is at the last key of ``[b, groups, k, head]``.

    The keys before the first query are attended to without a mask; torch's kernel for the CPU begins at the first key.
    """
    found: torch.Tensor = _Behind.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return found


class _Behind(torch.autograd.Function):
    """Attention to the keys before the first query, merged with that to the keys from there on."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> Any:
        merged = Merged(query.permute(2, 0, 1, 3), value.size(-1))
        for keys, causal in _before_and_within(query, key):
            part = attend_part(query, key[:, :, keys], value[:, :, keys], None, causal, scale)
            merged.add(slice(None), *part)
        out = merged.out.to(query.dtype).permute(1, 2, 0, 3)
        ctx.save_for_backward(query, key, value, out, merged.total)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, out, total = ctx.saved_tensors
        of_query, of_keys, of_values = torch.zeros_like(query), [], []
        for keys, causal in _before_and_within(query, key):
            k, v = key[:, :, keys], value[:, :, keys]
            more, of_key, of_value = part_gradients(gradients[0], query, k, v, out, total, None, causal, ctx.scale)
            of_query += more
            of_keys.append(of_key)
            of_values.append(of_value)
        return of_query, torch.cat(of_keys, dim=2), torch.cat(of_values, dim=2), None


def _before_and_within(query: torch.Tensor, key: torch.Tensor) -> list[tuple[slice, bool]]:
    first = key.size(2) - query.size(2)
    return [(slice(first), False), (slice(first, None), True)]


def _takes_flash(query: torch.Tensor, seen: torch.Tensor | None) -> bool:
    return seen is None and query.dtype != torch.float32 and query.size(-1) % 8 == 0


def _added(seen: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores, ``[b or 1, 1, q, k]``."""
    if seen is None:
        return None
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, float("-inf"))
    return mask.expand(-1, -1, query.size(2), -1)


def _aligned(seen: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """As ``_added``, for all rows and heads, laid out as the efficient kernel asks for."""
    mask = _added(seen, query)
    if mask is None:
        return None
    wide = F.pad(mask, (0, -key.size(2) % _ALIGNED))
    return wide[..., : key.size(2)].expand(query.size(0), query.size(1), -1, -1)
