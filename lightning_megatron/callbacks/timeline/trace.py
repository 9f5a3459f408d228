"""Writes a step as a trace that https://ui.perfetto.dev opens, with a process for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_megatron.callbacks.timeline.spans import RankTimeline, Span
from lightning_megatron.distributed.layout import ParallelLayout


def trace(timelines: Sequence[RankTimeline], layout: ParallelLayout) -> dict[str, Any]:
    """The trace, ready for JSON.

    Args:
        timelines: Timelines of all ranks, which begin at the same time.
        layout: Layout of the run.
    """
    chunks = layout.vp or 1
    threads = {chunk: f"virtual stage {chunk}" if chunks > 1 else "stage" for chunk in range(chunks)}
    threads |= {chunks: "exchange", chunks + 1: "gradients and optimizer"}
    events: list[dict[str, Any]] = []
    for timeline in timelines:
        events.append(_named("process_name", timeline.rank, 0, timeline.name))
        events.extend(_named("thread_name", timeline.rank, thread, name) for thread, name in threads.items())
        events.extend(_event(timeline.rank, span, chunks) for span in timeline.spans)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _event(rank: int, span: Span, chunks: int) -> dict[str, Any]:
    is_pass = span.kind in ("forward", "backward")
    thread = span.chunk if is_pass else chunks if span.kind == "exchange" else chunks + 1
    return {
        "ph": "X",
        "name": f"{span.kind} {span.micro_batch}" if is_pass else span.kind,
        "cat": span.kind,
        "pid": rank,
        "tid": thread,
        "ts": span.start * 1e6,
        "dur": (span.end - span.start) * 1e6,
        "args": {"micro_batch": span.micro_batch, "virtual_stage": span.chunk} if is_pass else {},
    }
