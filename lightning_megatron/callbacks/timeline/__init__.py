"""One step's schedule on all ranks, as a picture and as a trace."""

from lightning_megatron.callbacks.timeline.picture import draw
from lightning_megatron.callbacks.timeline.spans import RankTimeline, Span, bubble, ideal_bubble, spans
from lightning_megatron.callbacks.timeline.trace import trace

__all__ = ["RankTimeline", "Span", "bubble", "draw", "ideal_bubble", "spans", "trace"]
