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
) -> torch.Tensor:
    """Whether a query looks at a key; numbers of rows and places in them are broadcast against one another.

    Args:
        causal: Whether no query looks ahead.
        window: Tokens that a query looks at, itself included, where none looks ahead; None: all.
        documents: As ``AttentionPattern`` has them.
        keep: As ``AttentionPattern`` has it.
        row: Number of the row.
        query: Place of the query in its row.
        key: Place of the key.
    """
    seen = query >= key if causal else (query >= 0) & (key >= 0)
    if window is not None:
        seen = seen & (query - key < window)
    if documents is not None:
        seen = seen & (documents[row, query] == documents[row, key])
    if keep is not None:
        seen = seen & keep[row, key]
    return seen


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionPattern:
    """No token looks beyond its own document, none at padding, and in causal rows none ahead.

    A query that may look nowhere gets zeros from attention.

    Args:
        length: Number of keys of a row.
        documents: ``[b, s]``, the number of each token's document, which never falls along a row. None: a row is one.
        keep: ``[b, s]``, False where no query looks at a key, as at padding. None: all keys are looked at.
        queries: The places of the queries in the row; None: every token is a query.
        causal: Whether no token looks ahead; False for encoders.
    """

    length: int
    documents: torch.Tensor | None = None
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

    def padded(self, more: int) -> Self:
        """The pattern of rows with ``more`` tokens behind them, a document of their own."""
        documents, keep = self.documents, self.keep
        if documents is not None:
            documents = torch.cat([documents, documents[:, -1:].expand(-1, more) + 1], dim=1)
        if keep is not None:
            keep = F.pad(keep, (0, more), value=False)
        if self.same_rows and not self.causal:
            raise ValueError("Rows of an encoder that are padded need to say what is kept.")
        return type(self)(length=self.length + more, documents=documents, keep=keep, causal=self.causal)

    def to(self, device: torch.device) -> Self:
        """The pattern with its tensors on ``device``."""
        documents, keep = (None if x is None else x.to(device) for x in (self.documents, self.keep))
        return replace(self, documents=documents, keep=keep)

    def made(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` returned when it was first asked for under ``key``: the layers of a model share it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def dense(self, window: int | None, device: torch.device) -> torch.Tensor:
        """``[b or 1, 1, queries, s]``, True where a query may not look (Megatron's convention)."""

        def make() -> torch.Tensor:
            given = self.documents if self.keep is None else self.keep
            rows = torch.arange(1 if given is None else len(given), device=device)[:, None, None, None]
            places = torch.arange(self.length, device=device)
            queries = places[self.queries.start : self.queries.stop, None]
            return ~looks(self.causal, window, self.documents, self.keep, rows, queries, places)

        return self.made(("dense", window, device), make)


class PatternParams(PackedSeqParams):
    """Carries a pattern through megatron-core's blocks and their recomputation to each layer's core attention.

    megatron-core hands ``packed_seq_params`` on as they are, where an ``attention_mask`` must be a tensor to be saved.
    """

    def __init__(self, pattern: AttentionPattern) -> None:
        length = pattern.length
        super().__init__(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length)
        self.pattern = pattern


def block_arguments(mask: AttentionPattern | torch.Tensor | None) -> dict[str, Any]:
    """The arguments by which megatron-core's models and blocks take a pattern, or a mask."""
    if isinstance(mask, AttentionPattern):
        return {"attention_mask": None, "packed_seq_params": PatternParams(mask)}
    return {"attention_mask": mask}


@functools.lru_cache(maxsize=8)
def causal_pattern(length: int, queries: int) -> AttentionPattern:
    """Rows that are one document each; the last of ``queries`` is the last token."""
    return AttentionPattern(length=length, queries=range(length - queries, length))
