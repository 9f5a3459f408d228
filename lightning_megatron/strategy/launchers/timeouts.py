"""The two time-outs of a run: one until its first step, for which ranks take unequally long, and one after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning_megatron.distributed import process_group_backends

_START = timedelta(minutes=30)


class Timeouts:
    """How long ranks wait for one another.

    Until the first step has ended, one rank may download data, read weights or compile while the others wait, which
    says nothing of how long a collective takes in training. Megatron-LM has the same two
    (``--distributed-timeout-minutes``, ``--distributed-timeout-seconds-after-init``).

    Args:
        collective: How long a collective may take after the first step.
        start: How long the ranks wait until all have started, and a collective until the first step has ended. None is
            30 minutes, or ``collective`` if that is longer.
    """

    def __init__(self, collective: timedelta, start: timedelta | None = None) -> None:
        self.collective = collective
        self.start = start or max(_START, collective)
        self._is_starting = False

    def begin_start(self) -> None:
        """Let collectives take as long as a start may; all ranks have met, and have their process groups."""
        process_group_backends.set_timeout(max(self.start, self.collective))
        self._is_starting = True

    @contextmanager
    def step(self, trainer: Any) -> Iterator[None]:
        """Run a step; when the first has ended, collectives may take no longer than in training from then on.

        Args:
            trainer: The Trainer. Steps of its sanity check do not count: the first step of training is still to come.
        """
        yield
        if self._is_starting and not trainer.sanity_checking:
            process_group_backends.set_timeout(self.collective)
            self._is_starting = False
