"""Which blocks of queries and keys of a row see one another, and by what mask, so that no mask is as large as s²."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lightning_megatron.models.layers.attention_pattern import AttentionPattern

_BLOCK = 512  # queries of a block with a mask


class Block(NamedTuple):
    """Queries and keys of which some see one another.

    Args:
        queries: Places of the queries.
        keys: Places of the keys.
        causal: Whether they are the same places, and no query looks ahead.
        seen: ``[b or 1, 1, queries or 1, keys]``, whether a query looks at a key; None: at all, but for ``causal``.
    """

    queries: range
    keys: range
    causal: bool = False
    seen: torch.Tensor | None = None


class Visible:
    """Who looks at whom in whole rows.

    Args:
        pattern: As attention is given it, or None.
        mask: ``[b or 1, 1, s or 1, s]``, True where a query may not look, or None; there is no ``pattern`` beside it.
        window: Tokens that a query looks at, itself included; None: all.
        device: Where masks are made.
        causal: Whether the ``window`` beside a ``mask`` lies behind a query alone, and not ahead of it, too.
    """

    def __init__(
        self,
        pattern: AttentionPattern | None,
        mask: torch.Tensor | None,
        window: int | None,
        device: torch.device,
        causal: bool = True,
    ) -> None:
        self.pattern, self.mask, self.window, self.device = pattern, mask, window, device
        self._distances = AttentionPattern(length=0, causal=causal)

    def blocks(self, queries: range, keys: range) -> Iterator[Block]:
        """The blocks of two chunks of a row; none where no query looks at a key."""
        if self.pattern is None:
            yield from self._of_mask(queries, keys)
        elif not self.pattern.causal or keys.start < queries.stop:
            yield from self._of_pattern(self.pattern, queries, keys)

    def reach(self, queries: range, keys: range) -> range:
        """``keys`` without those that no query of the block looks at, as far as it is known without asking a device."""
        if self.pattern is not None:
            return self._within_reach(self.pattern, queries, keys)
        return keys if self.window is None else self._within_reach(self._distances, queries, keys)

    def seen(self, queries: range, keys: range) -> torch.Tensor | None:
        """``[b or 1, 1, queries or 1, keys]``, whether a query looks at a key; None: each at all."""
        if self.pattern is not None:
            return self._seen(self.pattern, queries, keys)
        if self.mask is None:
            return None
        mask = self.mask if self.mask.size(2) == 1 else self.mask[:, :, queries.start : queries.stop]
        seen = ~mask[..., keys.start : keys.stop]
        return seen if self.window is None else seen & self._seen(self._distances, queries, keys)

    def _of_mask(self, queries: range, keys: range) -> Iterator[Block]:
        whole = self.mask is None or (self.mask.size(2) == 1 and self.window is None)
        for block in [queries] if whole else _cut(queries):
            yield Block(block, keys, seen=self.seen(block, keys))

    def _of_pattern(self, pattern: AttentionPattern, queries: range, keys: range) -> Iterator[Block]:
        ahead = 0 if pattern.causal else keys.stop - queries.start
        in_window = self.window is None or max(queries.stop - keys.start, ahead) <= self.window
        if pattern.same_rows and in_window:
            if not pattern.causal or keys.stop <= queries.start + 1:
                yield Block(queries, keys)
                return
            if queries == keys:
                yield Block(queries, keys, causal=True)
                return
        for block in _cut(queries):
            seen = self._within_reach(pattern, block, keys)
            if seen:
                yield Block(block, seen, seen=self._seen(pattern, block, seen))

    def _within_reach(self, pattern: AttentionPattern, queries: range, keys: range) -> range:
        first, last = keys.start, keys.stop
        if pattern.causal:
            last = min(last, queries.stop)
        if self.window is not None:
            first = max(first, queries.start - self.window + 1)
            last = last if pattern.causal else min(last, queries.stop + self.window - 1)
        if pattern.documents is not None and pattern.documents.device.type == "cpu":
            begin, end = pattern.made(("borders",), lambda: _borders(pattern))
            first, last = max(first, begin[queries.start]), min(last, end[queries.stop - 1])
        return range(first, max(first, last))

    def _seen(self, pattern: AttentionPattern, queries: range, keys: range) -> torch.Tensor:
        given = pattern.documents if pattern.keep is None else pattern.keep
        rows = torch.arange(1 if given is None else len(given), device=self.device)[:, None, None, None]
        query, key = (torch.arange(x.start, x.stop, device=self.device) for x in (queries, keys))
        seen = pattern.looks(self.window, rows, query[:, None], key)
        return seen if seen.dim() == 4 else seen[None, None]


def _cut(places: range) -> Iterator[range]:
    return (places[first : first + _BLOCK] for first in range(0, len(places), _BLOCK))


def _borders(pattern: AttentionPattern) -> tuple[list[int], list[int]]:
    """Of each query's place, where its document begins at the earliest in any row, and where it ends at the latest."""
    assert pattern.documents is not None
    keys = pattern.documents.contiguous()
    queries = keys if pattern.query_documents is None else pattern.query_documents.contiguous()
    begin = torch.searchsorted(keys, queries).amin(dim=0)
    end = torch.searchsorted(keys, queries, right=True).amax(dim=0)
    return begin.tolist(), end.tolist()
