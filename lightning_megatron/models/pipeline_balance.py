"""Cuts layers into pipeline stages so that the slowest stage is as fast as possible: ``layers_per_stage="auto"``.

A pipeline runs at the pace of its slowest rank. Times are whole numbers, such as multiplications: all ranks find the
same cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class LayerTimes:
    """How long one micro-batch takes, forward and backward, in any unit.

    Args:
        layers: Of each layer.
        first: Of what is before the layers, on the first stage.
        last: Of what is behind them, on the last stage.
        again: Of the computation of each layer that recomputation adds.
        recomputed: How many layers of a stage, from its first, are computed again.
    """

    layers: Sequence[int]
    first: int = 0
    last: int = 0
    again: Sequence[int] = ()
    recomputed: int = 0


class Balance:
    """Finds the layers of each stage.

    Args:
        times: How long the layers and what is around them take.
        stages: The number of stages; virtual ones count each.
        fewest_last: The fewest layers of the last stage, 0 or 1; all others have at least one.
    """

    def __init__(self, times: LayerTimes, stages: int, fewest_last: int = 0) -> None:
        self.times, self.stages, self.fewest_last = times, stages, fewest_last
        self.layers = len(times.layers)
        self._before = [0, *accumulate(times.layers)]
        self._again_before = [0, *accumulate(times.again or [0] * self.layers)]

    @property
    def fewest(self) -> int:
        """The fewest layers that the stages can have in all."""
        return self.stages - 1 + max(self.fewest_last, self.stages == 1)

    def cut(self, ranks: int) -> tuple[int, ...]:
        """The layers of each stage; there must be at least ``fewest``.

        Without virtual stages the slowest stage is the fastest that there can be, and of several such cuts the one is
        taken whose stages keep the least activations: of the 1F1B schedule, stage ``i`` keeps those of ``ranks − i``
        micro-batches. With virtual stages, layers move between stages as long as that makes a rank's time, all its
        stages together, more alike.

        Args:
            ranks: Pipeline ranks; stage ``i`` is on rank ``i % ranks``.
        """
        slowest = self._least(max, self.time)[0]

        def kept(begin: int, end: int, stage: int) -> float:
            """The square of what the stage keeps, so that the fullest stages count most; too slow ones do not count."""
            time = self.time(begin, end, stage)
            weight = (end - begin) * (ranks - stage) if ranks == self.stages else time
            return float("inf") if time > slowest else weight**2

        found = self._least(lambda one, other: one + other, kept)[1]
        return found if ranks == self.stages else self._more_alike(found, ranks)

    def time(self, begin: int, end: int, stage: int) -> int:
        """How long the stage takes that has the layers from ``begin`` up to ``end``."""
        again = min(begin + self.times.recomputed, end)
        ends = self.times.first * (stage == 0) + self.times.last * (stage == self.stages - 1)
        return self._before[end] - self._before[begin] + self._again_before[again] - self._again_before[begin] + ends

    def stage_times(self, counts: Sequence[int]) -> list[int]:
        """How long each stage of a cut takes."""
        ends = list(accumulate(counts))
        return [self.time(end - count, end, stage) for stage, (end, count) in enumerate(zip(ends, counts, strict=True))]

    def _least(
        self, joined: Callable[[float, float], float], cost: Callable[[int, int, int], float]
    ) -> tuple[float, tuple[int, ...]]:
        """The cut whose joined costs are the least: by dynamic programming over stages and the layers before them."""
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0, ())}  # by the number of layers so far
        for stage in range(self.stages):
            left = self.stages - 1 - stage
            fewest = 1 if left or self.stages == 1 else self.fewest_last
            later = left - 1 + self.fewest_last if left else 0  # layers that the stages behind need
            ends = range(self.layers - later + 1) if left else [self.layers]
            found: dict[int, tuple[float, tuple[int, ...]]] = {}
            for end in ends:
                for begin in range(end - fewest, -1, -1):
                    alone = cost(begin, end, stage)  # which grows as the stage begins earlier
                    if end in found and alone > found[end][0]:
                        break
                    if begin in best:
                        so_far, counts = best[begin]
                        way = joined(so_far, alone), (*counts, end - begin)
                        found[end] = min(way, found.get(end, way))
            best = found
        return best[self.layers]

    def _more_alike(self, counts: tuple[int, ...], ranks: int) -> tuple[int, ...]:
        """Move a layer from a stage of the slowest rank, or the slowest stage, to another, as long as that helps."""

        def unlike(cut: tuple[int, ...]) -> tuple[int, int, int, int]:
            times = self.stage_times(cut)
            whole = [sum(times[rank::ranks]) for rank in range(ranks)]
            return max(whole), sum(time**2 for time in whole), max(times), sum(time**2 for time in times)

        while True:
            times = self.stage_times(counts)
            whole = [sum(times[rank::ranks]) for rank in range(ranks)]
            moves = [
                tuple(count - (stage == giver) + (stage == taker) for stage, count in enumerate(counts))
                for giver in range(self.stages)
                for taker in range(self.stages)
                if (whole[giver % ranks] == max(whole) or times[giver] == max(times))
                and counts[giver] > (self.fewest_last if giver == self.stages - 1 else 1)
                and giver != taker
            ]
            best = min(moves, key=lambda cut: (unlike(cut), cut), default=counts)
            if unlike(best) >= unlike(counts):
                return counts
            counts = best
