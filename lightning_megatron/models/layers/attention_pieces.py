"""Attention piece by piece, where torch has no kernel for documents and windows: on the CPU, or without FlexAttention.

A row is cut at its documents, and a window into blocks of queries, so that each piece is an attention that torch's
kernels take, to the keys that its queries look at and no others. Memory grows with the sum of the pieces: no tensor is
as large as the square of a row's length, and masks that only one block of queries has are not kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from lightning_megatron.models.layers.attention_pattern import AttentionPattern
from lightning_megatron.models.layers.recomputed_call import call_again_in_backward
from lightning_megatron.models.layers.sdpa import Kernel

JOINED = 64  # tokens up to which short documents are one piece with a mask, which is faster than a call for each
_BLOCK = 256  # queries of a piece with a mask


class Piece(NamedTuple):
    """One call of the kernel.

    Args:
        queries: Places of the queries in the row.
        keys: Places of the keys; none where the queries look nowhere.
        mask: ``[queries, keys]``, added to the scores; or what makes it, where it is no other piece's: it is made when
            it is needed, in the backward pass again.
        causal: Whether the last query is the last key, and none looks ahead.
    """

    queries: range
    keys: range
    mask: torch.Tensor | Callable[[], torch.Tensor] | None = None
    causal: bool = False

    @property
    def is_made_again(self) -> bool:
        """Whether it is computed in the backward pass, too."""
        return callable(self.mask)

    def attend(self, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Call the kernel with queries, keys and values ``[1, heads, s, head]``."""
        if self.mask is None or isinstance(self.mask, torch.Tensor):
            return kernel(query, key, value, self.mask, self.causal)
        make = self.mask
        return call_again_in_backward(lambda q, k, v: kernel(q, k, v, make(), False), query, key, value)


def attend_in_pieces(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    window: int | None,
    kernel: Kernel,
) -> torch.Tensor:
    """Attention of ``query`` ``[s, b, heads, head]`` to ``key`` and ``value`` ``[s, b, groups, head]``.

    Returns:
        ``[s, b, heads, head]``, with heads of the values' size.
    """
    rows = pattern.made(("pieces", window, query.dtype, query.device), lambda: _plan(pattern, window, query))
    if pattern.same_rows:  # then the rows are further heads
        q, k, v = (x.flatten(1, 2) for x in (query, key, value))
        return _attend_row(q, k, v, rows[0], kernel).unflatten(1, query.shape[1:3])
    found = [
        _attend_row(q, k, v, pieces, kernel)
        for q, k, v, pieces in zip(query.unbind(1), key.unbind(1), value.unbind(1), rows, strict=True)
    ]
    return found[0].unsqueeze(1) if len(found) == 1 else torch.stack(found, dim=1)


def _attend_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: list[Piece], kernel: Kernel
) -> torch.Tensor:
    """``[s, heads, head]``; each tensor is split once, so that its gradient is joined once.

    Pieces that are made again take a part of the whole tensor: blocks of a causal row have most keys in common.
    """
    once = [piece for piece in pieces if not piece.is_made_again]
    cuts = sorted({0, key.size(0)} | {place for piece in once for place in (piece.keys.start, piece.keys.stop)})
    sizes = [stop - start for start, stop in pairwise(cuts)]
    numbers = {place: number for number, place in enumerate(cuts)}
    keys, values = key.split(sizes), value.split(sizes)
    found = []
    for piece, queries in zip(pieces, query.split([len(piece.queries) for piece in pieces]), strict=True):
        if not piece.keys:
            found.append((queries[..., :1] * 0.0).expand(-1, -1, value.size(-1)))
            continue
        if piece.is_made_again:
            seen = [x[piece.keys.start : piece.keys.stop] for x in (key, value)]
        else:
            part = slice(numbers[piece.keys.start], numbers[piece.keys.stop])
            seen = [_join(keys[part]), _join(values[part])]
        q, k, v = (x.transpose(0, 1)[None] for x in (queries, *seen))
        found.append(piece.attend(kernel, q, k, v)[0].transpose(0, 1))
    return _join(tuple(found))


def _join(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _plan(pattern: AttentionPattern, window: int | None, like: torch.Tensor) -> list[list[Piece]]:
    """The pieces of each row in the order of their queries; of one row where all are alike."""
    given = pattern.documents if pattern.keep is None else pattern.keep
    masks: dict[tuple[int, int, int], torch.Tensor] = {}
    on_host = pattern.to(torch.device("cpu"))
    return [
        list(_Row(on_host, row, window, like.dtype, like.device, masks).pieces())
        for row in range(1 if given is None else len(given))
    ]


class _Row(NamedTuple):
    """One row of a pattern; ``masks`` are those of blocks in which only distances count, which all rows share."""

    pattern: AttentionPattern
    number: int
    window: int | None
    dtype: torch.dtype
    device: torch.device
    masks: dict[tuple[int, int, int], torch.Tensor]

    def pieces(self) -> Iterator[Piece]:
        if self.pattern.query_documents is not None:
            yield from self._of_other_row(self.pattern.query_documents[self.number])
            return
        first, last = self.pattern.queries.start, self.pattern.queries.stop
        for documents in _joined(self._documents()):
            start, stop = max(documents[0].start, first), min(documents[-1].stop, last)
            if start >= stop:
                continue
            seen = range(documents[0].start, stop if self.pattern.causal else documents[-1].stop)
            if len(documents) > 1:
                yield self._masked(range(start, stop), seen)
            else:
                yield from self._of_document(seen, range(start, stop))

    def _of_other_row(self, theirs: torch.Tensor) -> Iterator[Piece]:
        """The pieces of queries whose documents' numbers are ``theirs``, each of its document's keys."""
        assert self.pattern.documents is not None
        places = dict(_ranges(self.pattern.documents[self.number]))
        given = self.pattern.queries
        for number, each in _ranges(theirs):
            queries = range(max(each.start, given.start), min(each.stop, given.stop))
            if queries:
                yield from self._of_document(places.get(number, range(0)), queries)

    def _documents(self) -> Iterator[range]:
        numbers = self.pattern.documents
        if numbers is None:
            yield range(self.pattern.length)
            return
        yield from (places for _, places in _ranges(numbers[self.number]))

    def _of_document(self, keys: range, queries: range) -> Iterator[Piece]:
        """The pieces of ``queries`` of one document, of which they may look at ``keys``."""
        kept, start = keys, keys.start
        if self.pattern.keep is not None:
            places = self.pattern.keep[self.number, start : keys.stop].nonzero().flatten().tolist()
            if not places:
                yield Piece(queries, range(start, start))
                return
            kept = range(start + places[0], start + places[-1] + 1)
            if len(kept) != len(places):
                yield from self._with_holes(queries, kept)
                return
        if not self.pattern.causal:
            yield from [Piece(queries, kept)] if self.window is None else self._blocks(queries, kept, alike=True)
            return
        before, inside, behind = _parted(queries, kept)
        if before:
            yield Piece(before, range(start, start))
        if inside:
            yield from self._causal(inside, kept)
        if behind:
            yield from [Piece(behind, kept)] if self.window is None else self._blocks(behind, kept, alike=True)

    def _with_holes(self, queries: range, keys: range) -> Iterator[Piece]:
        """Queries of one document, of whose ``keys`` some are not looked at."""
        if self.pattern.causal or self.window is not None:
            yield from self._blocks(queries, keys, alike=False)
        else:  # all look at the same keys
            mask = self._mask(queries[:1], keys, alike=False)
            yield Piece(queries, keys, mask.expand(len(queries), -1))

    def _causal(self, queries: range, keys: range) -> Iterator[Piece]:
        """Queries within ``keys``: without a mask where torch's causal kernels take them."""
        if self.window is None:
            yield Piece(queries, range(keys.start, queries.stop), causal=True)
            return
        if queries.start == keys.start:
            unmasked = queries[: self.window]
            yield Piece(unmasked, unmasked, causal=True)
            queries = queries[len(unmasked) :]
        yield from self._blocks(queries, keys, alike=True)

    def _blocks(self, queries: range, keys: range, *, alike: bool) -> Iterator[Piece]:
        """Pieces with masks; ``alike`` where the mask says nothing but how far a query looks."""
        size = _BLOCK if self.window is None else max(_BLOCK // 2, self.window // 2)
        for first in range(0, len(queries), size):
            block = queries[first : first + size]
            start = keys.start if self.window is None else max(keys.start, block.start - self.window + 1)
            ahead = 0 if self.pattern.causal or self.window is None else self.window - 1
            seen = range(start, max(start, min(keys.stop, block.stop + ahead)))
            if not seen or not alike:
                yield Piece(block, seen, functools.partial(self._mask, block, seen, alike=False) if seen else None)
                continue
            distance = (block.start - seen.start, len(block), len(seen))
            if distance not in self.masks:
                self.masks[distance] = self._mask(block, seen, alike=True)
            yield Piece(block, seen, self.masks[distance])

    def _masked(self, queries: range, keys: range) -> Piece:
        return Piece(queries, keys, self._mask(queries, keys, alike=False))

    def _mask(self, queries: range, keys: range, *, alike: bool) -> torch.Tensor:
        pattern = AttentionPattern(length=0, causal=self.pattern.causal) if alike else self.pattern
        query, key = (torch.arange(places.start, places.stop, device="cpu") for places in (queries, keys))
        seen = pattern.looks(self.window, self.number, query[:, None], key)
        mask = torch.zeros(seen.shape, dtype=self.dtype, device="cpu").masked_fill(~seen, float("-inf"))
        return mask.to(self.device)


def _ranges(documents: torch.Tensor) -> Iterator[tuple[int, range]]:
    """The number of each document of a row, and its places."""
    numbers, counts = torch.unique_consecutive(documents, return_counts=True)
    places = pairwise(accumulate(counts.tolist(), initial=0))
    yield from ((number, range(*ends)) for number, ends in zip(numbers.tolist(), places, strict=True))


def _joined(documents: Iterator[range]) -> Iterator[list[range]]:
    """Consecutive documents of ``JOINED`` tokens together, and longer ones alone."""
    group: list[range] = []
    for document in documents:
        if group and document.stop - group[0].start > JOINED:
            yield group
            group = []
        group.append(document)
    yield group


def _parted(places: range, inner: range) -> tuple[range, range, range]:
    """``places`` before, inside and behind ``inner``."""
    first = min(max(inner.start, places.start), places.stop)
    last = min(max(inner.stop, first), places.stop)
    return range(places.start, first), range(first, last), range(last, places.stop)
