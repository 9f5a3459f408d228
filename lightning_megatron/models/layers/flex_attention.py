"""torch's FlexAttention on CUDA: documents, windows and padding by a mask of blocks, without a tensor of s²."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lightning_megatron.models.layers.attention_pattern import AttentionPattern, looks

ScoreMod = Callable[..., torch.Tensor]

_BLOCK = 128  # tokens of a block; torch's own default
_SMALLEST_HEAD = 16  # of torch's kernel

_failures: list[str] = []  # why compilation failed in this process


def why_not(query: torch.Tensor, dropout: float) -> str:
    """Why FlexAttention cannot compute the attention of ``query``; empty where it can."""
    if query.device.type != "cuda":
        return f"FlexAttention trains on CUDA only, and the tensors are on {query.device.type!r}"
    if dropout:
        return f"FlexAttention has no dropout, and attention_dropout is {dropout}"
    if query.size(-1) < _SMALLEST_HEAD:
        return f"FlexAttention takes heads of {_SMALLEST_HEAD} or more channels, and these have {query.size(-1)}"
    return _failures[0] if _failures else ""


def attend_by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    window: int | None,
    scale: float | None,
    cap: float | None = None,
) -> torch.Tensor | None:
    """Attention of ``query`` ``[s, b, heads, head]`` to ``key`` and ``value`` ``[s, b, groups, head]``; as ``query``.

    Scores are kept within ``cap``, as ``cap · tanh(score / cap)``.

    Returns:
        None where torch cannot compile the kernel here, which is warned about once.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    try:
        mask = pattern.made(("blocks", window, query.device), lambda: block_mask(pattern, window, query.device))
        found: torch.Tensor = _compiled()(
            q, k, v, capped_scores(cap), block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _failures.append(f"FlexAttention cannot be compiled here ({type(error).__name__}: {str(error)[:300]})")
        warnings.warn(f"{_failures[0]}; attention takes a mask of queries and keys instead.", stacklevel=2)
        return None
    return found.permute(2, 0, 1, 3)  # torch lays the output out as the queries


@functools.cache
def capped_scores(cap: float | None) -> ScoreMod | None:
    """FlexAttention's change of a score, which is scaled already; the same function for each layer."""
    if cap is None:
        return None

    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@functools.cache
def _compiled():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, fullgraph=True)  # uncompiled, it makes scores of s²


def block_mask(pattern: AttentionPattern, window: int | None, device: torch.device) -> BlockMask:
    """FlexAttention's mask, from the first and the last token of each block; nothing is read from the device."""
    documents, keep, first, causal = pattern.documents, pattern.keep, pattern.queries.start, pattern.causal
    of_queries = pattern.query_documents
    queries = _Blocks(pattern.queries, documents if of_queries is None else of_queries, device)
    keys = _Blocks(range(pattern.length), documents, device)
    full = queries.whole[:, None] & keys.whole
    some = torch.ones_like(full)
    if pattern.causal:
        some = queries.last[:, None] >= keys.first
        full = full & (queries.first[:, None] >= keys.last)
    if window is not None:
        some = some & (queries.first[:, None] - keys.last < window)
        full = full & (queries.last[:, None] - keys.first < window)
        if not pattern.causal:
            some = some & (keys.first - queries.last[:, None] < window)
            full = full & (keys.last - queries.first[:, None] < window)
    some, full = some[None], full[None]  # [b or 1, blocks of queries, blocks of keys]
    if documents is not None:
        some = some & (queries.highest[:, :, None] >= keys.lowest[:, None])
        some = some & (queries.lowest[:, :, None] <= keys.highest[:, None])
        full = full & (queries.lowest[:, :, None] == keys.highest[:, None])
        full = full & (queries.highest[:, :, None] == keys.lowest[:, None])
    if keep is not None:
        more = -pattern.length % _BLOCK
        some = some & F.pad(keep, (0, more), value=False).unflatten(1, (-1, _BLOCK)).any(-1)[:, None]
        full = full & F.pad(keep, (0, more), value=True).unflatten(1, (-1, _BLOCK)).all(-1)[:, None]

    def mask_mod(row: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return looks(causal, window, documents, keep, row, query + first, key, of_queries)

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~full),
        *_ordered(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(len(pattern.queries), pattern.length),
    )


class _Blocks:
    """The places of the first and the last token of each block, and the numbers of their documents ``[b, blocks]``."""

    def __init__(self, places: range, documents: torch.Tensor | None, device: torch.device) -> None:
        self.first = torch.arange(places.start, places.stop, _BLOCK, device=device)
        self.last = (self.first + _BLOCK - 1).clamp(max=places.stop - 1)
        self.whole = self.last - self.first == _BLOCK - 1
        if documents is not None:
            self.lowest, self.highest = documents[:, self.first], documents[:, self.last]


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of queries the number of blocks of keys, and their numbers, in front of all others."""
    blocks = blocks[:, None].int()  # [b, 1, blocks of queries, blocks of keys]
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()
