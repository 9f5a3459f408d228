"""What a rank does when: megatron-core's own timers, told on to whoever listens; they cost nothing where nobody does.

megatron-core starts and stops a timer around each forward and backward pass of a micro-batch, each exchange between
stages, the reduction of gradients and the parts of an optimizer step, wherever its configuration has ``timers``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# megatron-core's names (0.16.1)
FORWARD, BACKWARD, SCHEDULE = "forward-compute", "backward-compute", "forward-backward"
GRADIENT_SYNC = (
    "all-grads-sync", "conditional-embedder-grads-all-reduce", "non-tensor-parallel-grads-all-reduce",
    "embedding-grads-all-reduce",
)  # fmt: skip
# ours
STEP, OPTIMIZER, SAVE = "step", "optimizer", "save"


class Listener(Protocol):
    """Who hears of what begins and ends on this rank, the inner before the outer."""

    def begin(self, name: str) -> None:
        """``name`` begins."""

    def end(self, name: str) -> None:
        """``name`` ends."""


class Timers:
    """megatron-core's ``timers``: ``timers(name).start()`` and ``.stop()``."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """The timer of that name."""
        return _Timer(self, name)


@dataclass(frozen=True)
class _Timer:
    timers: Timers
    name: str

    def start(self, barrier: bool = False) -> None:
        """Begin; no barrier, which would change what is watched."""
        for listener in self.timers.listeners:
            listener.begin(self.name)

    def stop(self, barrier: bool = False) -> None:
        """End."""
        for listener in self.timers.listeners:
            listener.end(self.name)


@contextmanager
def timed(timers: Timers | None, name: str) -> Iterator[None]:
    """Time what is inside, as megatron-core does; nothing where nobody listens."""
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
    """Something that a rank did.

    Args:
        name: What.
        start: Seconds of this machine's monotonic clock.
        end: Likewise.
    """

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


class Intervals:
    """A listener that keeps what it hears.

    On a GPU it marks the current stream, which goes on undisturbed, and asks for the times at the end.

    Args:
        device: Where the work is done.
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
        """Open one."""
        self._open.append((name, self._mark()))

    def end(self, name: str) -> None:
        """Close the last that was opened under this name; one that was open before anyone listened is left out."""
        for number in reversed(range(len(self._open))):
            if self._open[number][0] == name:
                self._closed.append((name, self._open.pop(number)[1], self._mark()))
                return

    def take(self) -> list[Interval]:
        """What was kept since the last time, in the order in which it began."""
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
