"""``PhaseTimes``: how long each phase of a step takes over the ranks, and which rank is late."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_megatron.callbacks.logging_schedule import log, logs_now
from lightning_megatron.distributed import collectives, lightning_private, process_groups
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.training.timers import BACKWARD, FORWARD, GRADIENT_SYNC, OPTIMIZER, SAVE, SCHEDULE, Intervals

# How a phase is made of what megatron-core times.
_PHASES = {
    "forward_backward": (SCHEDULE,),
    "compute": (FORWARD, BACKWARD),
    "gradient_sync": GRADIENT_SYNC,
    "optimizer": (OPTIMIZER,),
    "save": (SAVE,),
}
_OWN = ("data", "compute")  # phases in which a rank waits for no stage or replica
_LEAST = 0.01  # seconds a step that are worth a word


@answer_wrong_names
class PhaseTimes(pl.Callback):
    """Logs seconds a step of each phase: ``time/PHASE`` of the slowest rank, ``time/PHASE_min`` of the fastest, and
    ``time/PHASE_rank``, which rank is the slowest.

    Phases: ``data`` (waiting for the loader, and its batch's way to the device), ``forward_backward`` (the schedule:
    computing, exchanges between stages, waiting), of it ``compute`` (the passes of micro-batches alone) and
    ``gradient_sync``; ``optimizer``; ``save`` (what training waits for a checkpoint); ``step``, all of it.

    If a rank's ``data`` or ``compute`` takes more than ``factor`` times the median of the ranks that it is compared
    with, at two logged steps in a row, a warning names it. Data is compared over all ranks; computing over the ranks of
    the same pipeline stage, which do the same work, or over all ranks if a stage has one only. Ranks that share layers
    or rows (tp, cp) wait for one another inside ``compute``, so a slow rank slows its group.

    Args:
        factor: Multiple of the median from which on a rank is named.

    """

    watches_megatron = True  # so that a plain module on one rank is trained by Megatron's steps, too

    def __init__(self, factor: float = 1.5) -> None:
        Arguments(type(self).__name__, MisconfigurationException).number(least=1, factor=factor)
        self.factor = factor
        self.named: set[tuple[str, int]] = set()  # (phase, rank) that were told of
        self._suspected: set[tuple[str, int]] = set()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        self._intervals = Intervals(strategy.root_device)
        strategy.listen(self._intervals)
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._waiting_since = self._step_since = time.monotonic()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.stop_listening(self._intervals)  # type: ignore[attr-defined]

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._seconds["data"] += time.monotonic() - self._waiting_since

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.training and hasattr(self, "_intervals"):
            self._intervals.take()
            self._waiting_since = self._step_since = time.monotonic()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if lightning_private.ends_accumulation(trainer):
            self._steps += 1
            self._seconds["step"] += now - self._step_since
            self._step_since = now
            if logs_now(trainer):
                self._report(trainer, pl_module)
        self._waiting_since = time.monotonic()

    def _report(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for interval in self._intervals.take():
            for phase, names in _PHASES.items():
                if interval.name in names:
                    self._seconds[phase] += interval.seconds
        mine = {phase: self._seconds[phase] / self._steps for phase in ("data", *_PHASES, "step")}
        everyone = collectives.gather(mine, process_groups.gloo_world())
        values = {}
        for phase in mine:
            times = [each[phase] for each in everyone]
            values[f"time/{phase}"] = max(times)
            values[f"time/{phase}_min"] = min(times)
            values[f"time/{phase}_rank"] = float(times.index(max(times)))
        log(module, values)
        suspected_before, self._suspected = self._suspected, set()
        for phase in _OWN:
            self._name_stragglers(trainer, phase, [each[phase] for each in everyone], suspected_before)
        self._seconds.clear()
        self._steps = 0

    def _name_stragglers(
        self, trainer: pl.Trainer, phase: str, times: list[float], before: set[tuple[str, int]]
    ) -> None:
        layout = trainer.strategy.layout  # type: ignore[attr-defined]
        for rank, seconds in enumerate(times):
            stage = layout.coordinates(rank).pp
            alike = [other for other in range(len(times)) if other != rank]
            if phase != "data":
                same = [other for other in alike if layout.coordinates(other).pp == stage]
                alike = same or alike
            if not alike:
                continue
            usual = statistics.median(times[other] for other in alike)
            if seconds <= self.factor * usual or seconds - usual <= _LEAST:
                continue
            self._suspected.add((phase, rank))
            if (phase, rank) in before - self.named:
                self.named.add((phase, rank))
                rank_zero_warn(
                    f"{layout.rank_name(rank)} is slow: {phase} takes it {seconds:.3f} s a step, and its peers"
                    f" {usual:.3f} s."
                )
