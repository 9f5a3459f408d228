"""``AttentionPattern``: who looks at whom in rows of tokens, from which each attention kernel makes what it needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

T = TypeVar("T")


def looks(
    causal: bool,
    window: int | None,
    documents: torch.Tensor | None,
    keep: torch.Tensor | None,
    row: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    of_queries: torch.Tensor | None = None,
) -> torch.Tensor:
    """Whether a query looks at a key; numbers of rows and places in them are broadcast against one another.

    Args:
        causal: Whether no query looks ahead.
        window: Tokens that a query looks at, itself included, and where queries look ahead, as many on that side; None:
            all.
        documents: As ``AttentionPattern`` has them.
        keep: As ``AttentionPattern`` has it.
        row: Number of the row.
        query: Place of the query in its row.
        key: Place of the key.
        of_queries: As ``AttentionPattern`` has them, the ``query_documents``.
    """
    seen = query >= key if causal else (query >= 0) & (key >= 0)
    if window is not None:
        seen = seen & (query - key < window)
        if not causal:
            seen = seen & (key - query < window)
    if documents is not None:
        theirs = documents if of_queries is None else of_queries
        seen = seen & (theirs[row, query] == documents[row, key])
    if keep is not None:
        seen = seen & keep[row, key]
    return seen


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionPattern:
    """No token looks beyond its own document, none at padding, and in causal rows none ahead.

    A query that may look nowhere gets zeros from attention.

    Args:
        length: Number of keys of a row.
        documents: ``[b, s]``, the number of each key's document, which never falls along a row. None: a row is one.
        query_documents: ``[b, sq]``, the same of queries that are of other rows, as in cross-attention. None: the
            queries are of the keys' rows.
        keep: ``[b, s]``, False where no query looks at a key, as at padding. None: all keys are looked at.
        queries: The places of the queries in their row; None: every token of the keys' row is a query.
        causal: Whether no token looks ahead; False for encoders.
    """

    length: int
    documents: torch.Tensor | None = None
    query_documents: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    queries: range = None  # type: ignore[assignment]
    causal: bool = True
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.queries is None:
            object.__setattr__(self, "queries", range(self.length))

    @property
    def same_rows(self) -> bool:
        """Whether all rows have the same pattern."""
        return self.documents is None and self.keep is None

    def part(self, first: int, last: int) -> Self:
        """The same rows, of which the tokens from ``first`` to before ``last`` are the queries."""
        return self.made(("part", first, last), lambda: replace(self, queries=range(first, last)))

    def padded(self, more: int, more_queries: int | None = None) -> Self:
        """The pattern of rows with ``more`` tokens behind them, a document of their own.

        Args:
            more: Tokens to add behind the keys.
            more_queries: Tokens to add behind queries that are of other rows; None: as many.
        """
        if self.same_rows and not self.causal:
            raise ValueError("Rows of an encoder that are padded need to say what is kept.")
        more_queries = more if more_queries is None else more_queries
        keep = None if self.keep is None else F.pad(self.keep, (0, more), value=False)
        return replace(
            self,
            length=self.length + more,
            documents=_with_another(self.documents, more),
            query_documents=_with_another(self.query_documents, more_queries),
            keep=keep,
            queries=range(self.queries.start, self.queries.stop + more_queries),
        )

    def to(self, device: torch.device) -> Self:
        """The pattern with its tensors on ``device``."""
        tensors = (self.documents, self.query_documents, self.keep)
        documents, theirs, keep = (None if x is None else x.to(device) for x in tensors)
        return replace(self, documents=documents, query_documents=theirs, keep=keep)

    def made(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` returned when it was first asked for under ``key``: the layers of a model share it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def looks(self, window: int | None, row: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether a query looks at a key, as the function ``looks`` says it."""
        return looks(self.causal, window, self.documents, self.keep, row, query, key, self.query_documents)

    def dense(self, window: int | None, device: torch.device) -> torch.Tensor:
        """``[b or 1, 1, queries, s]``, True where a query may not look (Megatron's convention)."""

        def make() -> torch.Tensor:
            given = self.documents if self.keep is None else self.keep
            rows = torch.arange(1 if given is None else len(given), device=device)[:, None, None, None]
            places = torch.arange(self.length, device=device)
            queries = torch.arange(self.queries.start, self.queries.stop, device=device)[:, None]
            return ~self.looks(window, rows, queries, places)

        return self.made(("dense", window, device), make)


class PatternParams(PackedSeqParams):
    """Carries a pattern through megatron-core's blocks and their recomputation to each layer's core attention.

    megatron-core hands ``packed_seq_params`` on as they are, where an ``attention_mask`` must be a tensor to be saved.

    Args:
        pattern: Of self-attention; None where a mask says who looks at whom.
        crossing: Of a decoder's attention to an encoder's tokens, or None.
    """

    def __init__(self, pattern: AttentionPattern | None, crossing: AttentionPattern | None = None) -> None:
        length = None if pattern is None else pattern.length
        super().__init__(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length)
        self.pattern, self.crossing = pattern, crossing


Mask = AttentionPattern | torch.Tensor | None


def block_arguments(mask: Mask) -> dict[str, Any]:
    """The arguments by which megatron-core's models and blocks take a pattern, or a mask."""
    if isinstance(mask, AttentionPattern):
        return {"attention_mask": None, "packed_seq_params": PatternParams(mask)}
    return {"attention_mask": mask}


def decoder_arguments(mask: Mask, crossing: Mask) -> dict[str, Any]:
    """As ``block_arguments``, of a decoder, with the mask or pattern of its attention to an encoder's tokens."""
    patterns = [each if isinstance(each, AttentionPattern) else None for each in (mask, crossing)]
    tensors = [None if isinstance(each, AttentionPattern) else each for each in (mask, crossing)]
    found = {"attention_mask": tensors[0], "context_mask": tensors[1]}
    return found if patterns == [None, None] else {**found, "packed_seq_params": PatternParams(*patterns)}


def _with_another(documents: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """Numbers of documents ``[b, s]``, and behind them those of another document of so many tokens."""
    return None if documents is None else torch.cat([documents, documents[:, -1:].expand(-1, tokens) + 1], dim=1)


@functools.lru_cache(maxsize=8)
def plain_pattern(length: int, queries: int, causal: bool = True) -> AttentionPattern:
    """Rows that are one document each; the last of ``queries`` is the last token."""
    return AttentionPattern(length=length, queries=range(length - queries, length), causal=causal)
