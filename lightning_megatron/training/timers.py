"""Forwards the events of megatron-core's timers to listeners; without listeners, they cost nothing.

If its configuration has ``timers``, megatron-core starts and stops a timer around each forward and backward pass of a
micro-batch, each exchange between stages, the reduction of gradients and the parts of an optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# names of megatron-core's timers (0.16.1)
FORWARD, BACKWARD, SCHEDULE = "forward-compute", "backward-compute", "forward-backward"
GRADIENT_SYNC = (
    "all-grads-sync", "conditional-embedder-grads-all-reduce", "non-tensor-parallel-grads-all-reduce",
    "embedding-grads-all-reduce",
)  # fmt: skip
# names of this package's timers
STEP, OPTIMIZER, SAVE = "step", "optimizer", "save"


class Listener(Protocol):
    """Is told when an activity of this rank begins and ends."""

    def begin(self, name: str) -> None:
        """The activity ``name`` begins."""

    def end(self, name: str) -> None:
        """The activity ``name`` ends."""


class Timers:
    """megatron-core's ``timers``: ``timers(name).start()`` and ``.stop()``."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """Return the timer of that name."""
        return _Timer(self, name)


@dataclass(frozen=True)
class _Timer:
    timers: Timers
    name: str

    def start(self, barrier: bool = False) -> None:
        """Start; without the barrier, which would change what is measured."""
        for listener in self.timers.listeners:
            listener.begin(self.name)

    def stop(self, barrier: bool = False) -> None:
        """Stop; the barrier is left out here, too."""
        for listener in self.timers.listeners:
            listener.end(self.name)


@contextmanager
def timed(timers: Timers | None, name: str) -> Iterator[None]:
    """Time the body as megatron-core does; does nothing without timers."""
    if timers is None:
        yield
        return
    timer = timers(name)
    timer.start()
    try:
        yield
    finally:
        timer.stop()


@dataclass(frozen=True)
class Interval:
    """An activity of a rank.

    Args:
        name: Name of the activity.
        start: When it began, in seconds of this machine's monotonic clock.
        end: When it ended, by the same clock.
    """

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long the interval took, in seconds."""
        return self.end - self.start


class Intervals:
    """A listener that records intervals.

    On a GPU it records events on the current stream, without synchronising, and reads their times at the end.

    Args:
        device: The device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[tuple[str, Any]] = []
        self._closed: list[tuple[str, Any, Any]] = []
        self._zero: tuple[float, Any] | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._zero = (time.monotonic(), self._mark())

    def begin(self, name: str) -> None:
        """Note that an interval of this name begins."""
        self._open.append((name, self._mark()))

    def end(self, name: str) -> None:
        """Close the last interval of this name; one that began before this listener was added is ignored."""
        for number in reversed(range(len(self._open))):
            if self._open[number][0] == name:
                self._closed.append((name, self._open.pop(number)[1], self._mark()))
                return

    def take(self) -> list[Interval]:
        """Return the intervals since the last call, in the order in which they began."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        taken = [Interval(name, self._time(start), self._time(end)) for name, start, end in self._closed]
        self._closed = []
        return sorted(taken, key=lambda interval: interval.start)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _time(self, mark: Any) -> float:
        if self._zero is None:
            return float(mark)
        return self._zero[0] + self._zero[1].elapsed_time(mark) / 1000
