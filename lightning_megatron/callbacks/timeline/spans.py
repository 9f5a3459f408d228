"""Assigns megatron-core's times in a step to the micro-batch and the chunk that they were for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_megatron.distributed.layout import ParallelLayout, RankCoordinates
from lightning_megatron.training.timers import BACKWARD, FORWARD, GRADIENT_SYNC, OPTIMIZER, Interval

Kind = Literal["forward", "backward", "exchange", "gradient sync", "optimizer"]
_EXCHANGES = ("send", "recv")  # in the names of what stages do to pass hidden states and their gradients


@dataclass(frozen=True)
class Span:
    """A stretch of time in which a rank did one thing.

    Args:
        kind: The thing that it did.
        start: Seconds from the step's beginning.
        end: Seconds from the step's beginning.
        micro_batch: Number of a pass's micro-batch, from 0; -1 if the span is no pass.
        chunk: The virtual stage of a pass, from 0.
    """

    kind: Kind
    start: float
    end: float
    micro_batch: int = -1
    chunk: int = 0


@dataclass(frozen=True)
class RankTimeline:
    """What one rank did in one step.

    Args:
        rank: The global rank.
        place: The rank's coordinates in the layout.
        spans: The passes of the rank, in order of time.
    """

    rank: int
    place: RankCoordinates
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        """The rank and its coordinates, as a label."""
        return f"rank {self.rank} ({self.place})"

    def passes(self) -> list[Span]:
        """Forward and backward passes."""
        return [span for span in self.spans if span.kind in ("forward", "backward")]

    def shifted(self, seconds: float) -> RankTimeline:
        """The same timeline, ``seconds`` earlier."""
        moved = (replace(span, start=span.start - seconds, end=span.end - seconds) for span in self.spans)
        return replace(self, spans=tuple(moved))


def spans(intervals: Sequence[Interval], layout: ParallelLayout) -> tuple[Span, ...]:
    """Say of each pass which it was: a schedule's order is fixed, so that counting them is enough.

    Args:
        intervals: The timed intervals of one step of one rank, in order.
        layout: Layout of the run.
    """
    found, seen = [], Counter[str]()
    for interval in intervals:
        kind = _kind(interval.name)
        if kind is None:
            continue
        micro_batch, chunk = -1, 0
        if kind in ("forward", "backward"):
            micro_batch, chunk = _which(seen[kind], layout, forward=kind == "forward")
            seen[kind] += 1
        found.append(Span(kind, interval.start, interval.end, micro_batch, chunk))
    return tuple(found)


def bubble(timelines: Sequence[RankTimeline]) -> float:
    """The share of time, from the first pass to the last, in which the ranks computed nothing."""
    passes = [timeline.passes() for timeline in timelines]
    start = min(span.start for each in passes for span in each)
    end = max(span.end for each in passes for span in each)
    busy = sum(span.end - span.start for each in passes for span in each)
    return 1 - busy / (end - start) / len(timelines)


def ideal_bubble(layout: ParallelLayout, num_microbatches: int) -> float:
    """The share that stages of equal cost wait: (p-1) / (v·m + p-1) (Narayanan and others, arXiv 2104.04473)."""
    waits = layout.pp - 1
    return waits / ((layout.vp or 1) * num_microbatches + waits)


def _kind(name: str) -> Kind | None:
    if name == FORWARD:
        return "forward"
    if name == BACKWARD:
        return "backward"
    if name in GRADIENT_SYNC:
        return "gradient sync"
    if name == OPTIMIZER:
        return "optimizer"
    return "exchange" if any(word in name for word in _EXCHANGES) else None


def _which(number: int, layout: ParallelLayout, forward: bool) -> tuple[int, int]:
    """Micro-batch and chunk of a rank's pass ``number``: chunk by chunk for ``pp`` micro-batches at a time.

    ``forward_backward_pipelining_with_interleaving`` of megatron-core: forward from the first chunk, backward from the
    last.
    """
    if layout.vp is None:
        return number, 0
    group, inside = divmod(number, layout.pp * layout.vp)
    chunk, within = divmod(inside, layout.pp)
    return group * layout.pp + within, chunk if forward else layout.vp - 1 - chunk
