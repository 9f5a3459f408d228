"""Draws a step: a row for each stage, a box for each micro-batch's pass, and idle time in its own colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_megatron.callbacks import plots
from lightning_megatron.callbacks.timeline.spans import Kind, RankTimeline, bubble, ideal_bubble
from lightning_megatron.distributed.layout import ParallelLayout

# Of chunks in turn; distinguishable without colour by their brightness.
_FORWARD = ("#2f6db5", "#7fb0e6", "#1b3f6b", "#b8d4f2")
_BACKWARD = ("#d97a1f", "#f2b97a", "#8f4a08", "#f8dcbb")
_OTHERS: dict[Kind, str] = {"exchange": "#b5b5b5", "gradient sync": "#8a5fb0", "optimizer": "#4d4d4d"}
_IDLE = "#f6d5d5"
_MOST_ROWS = 32


def draw(timelines: Sequence[RankTimeline], layout: ParallelLayout, path: str | Path, title: str = "") -> Path:
    """Draw the stages of the first replica's first tensor and context rank; without a pipeline, those of all replicas.

    Args:
        timelines: Timelines of all ranks, which begin at the same time.
        layout: Layout of the run.
        path: File of the picture; its ending says the format.
        title: Names the step.
    """
    plt = plots.pyplot("PipelineTimeline")
    from matplotlib.patches import Patch

    rows = shown(timelines, layout)
    micro_batches = 1 + max(span.micro_batch for span in rows[0].passes())
    end = max(span.end for row in rows for span in row.spans)
    figure, axes = plt.subplots(figsize=(14, 1.7 + 0.62 * len(rows)), layout="constrained")
    for number, row in enumerate(rows):
        _draw_row(axes, row, number, end)
    axes.set_yticks(range(len(rows)), [_label(row, layout) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, end * 1e3)
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    idle = f"{bubble(rows):.0%} of the schedule idle"
    if layout.pp > 1:
        idle += f"; {ideal_bubble(layout, micro_batches):.0%} if all passes took equally long"
    heading = f"{title}{': ' if title else ''}{layout.sizes}, {micro_batches} micro-batches. {idle}"
    axes.set_title(heading, loc="left", fontsize=11)
    chunks = range(layout.vp or 1)
    name = "forward, chunk {}" if len(chunks) > 1 else "forward"
    legend = [Patch(color=_FORWARD[chunk % 4], label=name.format(chunk)) for chunk in chunks]
    name = name.replace("forward", "backward")
    legend += [Patch(color=_BACKWARD[chunk % 4], label=name.format(chunk)) for chunk in chunks]
    kinds = {span.kind for row in rows for span in row.spans}
    legend += [
        Patch(color=color, label="waiting for a stage" if kind == "exchange" else kind)
        for kind, color in _OTHERS.items()
        if kind in kinds
    ]
    legend.append(Patch(color=_IDLE, label="idle"))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 8), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, metadata={"Title": heading})
    plt.close(figure)
    return Path(path)


def shown(timelines: Sequence[RankTimeline], layout: ParallelLayout) -> list[RankTimeline]:
    """The ranks that the picture has rows for."""
    first = [each for each in timelines if each.place.tp == each.place.cp == 0]
    if layout.pp > 1:
        first = [each for each in first if each.place.dp == 0]
    return sorted(first, key=lambda each: (each.place.pp, each.place.dp))[:_MOST_ROWS]


def _label(row: RankTimeline, layout: ParallelLayout) -> str:
    what = f"stage {row.place.pp}" if layout.pp > 1 else f"replica {row.place.dp}"
    return f"{what}\nrank {row.rank}"


def _draw_row(axes: Any, row: RankTimeline, number: int, end: float) -> None:
    axes.barh(number, end * 1e3, height=0.8, color=_IDLE, linewidth=0)
    for span in sorted(row.spans, key=lambda span: span.kind in ("forward", "backward")):
        width = (span.end - span.start) * 1e3
        if span.kind in ("forward", "backward"):
            colors = _FORWARD if span.kind == "forward" else _BACKWARD
            color = colors[span.chunk % 4]
            axes.barh(number, width, left=span.start * 1e3, height=0.8, color=color, edgecolor="white", linewidth=0.6)
            if width > 0.007 * end * 1e3:
                dark = span.chunk % 2 == 0
                axes.text(
                    span.start * 1e3 + width / 2, number, str(span.micro_batch), ha="center", va="center",
                    fontsize=8, color="white" if dark else "black", clip_on=True,
                )  # fmt: skip
        else:
            axes.barh(number, width, left=span.start * 1e3, height=0.45, color=_OTHERS[span.kind], linewidth=0)
