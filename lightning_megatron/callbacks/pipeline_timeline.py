"""``PipelineTimeline``: which stage ran which micro-batch in a step, and when stages were idle."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_megatron.callbacks import plots
from lightning_megatron.callbacks.timeline import RankTimeline, draw, spans, trace
from lightning_megatron.distributed import collectives, lightning_private, process_groups
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.training.timers import Intervals

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # ranks of one machine share it, and its monotonic clock


@answer_wrong_names
class PipelineTimeline(pl.Callback):
    """Records the schedule of some optimizer steps on all ranks, and writes ``step-N.png`` and ``step-N.json``.

    The picture has a row for each pipeline stage: forward and backward passes with their micro-batch's number, what
    stages exchange, gradient reduction and the optimizer, and idle time in a colour of its own. The trace has all
    ranks, and opens in https://ui.perfetto.dev. Ranks of one machine share a clock; those of several are lined up by a
    barrier, to about a millisecond. Steps that are not recorded cost nothing; on a GPU those that are mark the stream
    with events and are waited for only at their end.

    Args:
        steps: Numbers of the optimizer steps, from 1; the first ones of a run are slower than the rest.
        directory: Directory of the pictures and traces. None: ``timeline`` in the Trainer's ``default_root_dir``.
    """

    watches_megatron = True  # so that a plain module on one rank is trained by Megatron's steps, too

    def __init__(self, steps: int | Sequence[int] = 5, directory: str | Path | None = None) -> None:
        for step in steps if isinstance(steps, Sequence) else [steps]:
            Arguments("PipelineTimeline", MisconfigurationException).whole(None, steps=step)
        self.steps = [steps] if isinstance(steps, int) else list(steps)
        if not self.steps or min(self.steps) < 1:
            raise MisconfigurationException(f"PipelineTimeline(steps={steps}): steps are numbered from 1.")
        self.directory = directory
        self.written: list[Path] = []
        self._intervals: Intervals | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        plots.check("PipelineTimeline")
        self._folder = Path(self.directory or Path(trainer.default_root_dir) / "timeline")
        problem = None
        if trainer.is_global_zero:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / ".tried").touch()
                (self._folder / ".tried").unlink()
            except OSError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise MisconfigurationException(f"PipelineTimeline(directory={str(self._folder)!r}): {problem}.")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        here = (_BOOT.read_text() if _BOOT.is_file() else "", _meet(trainer))
        machines = collectives.gather(here, process_groups.gloo_world())
        first = machines[0]
        self._ahead = 0.0 if here[0] == first[0] else here[1] - first[1]

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._intervals is None and trainer.global_step + 1 in self.steps:
            strategy: Any = trainer.strategy
            trainer.strategy.barrier()
            self._intervals = Intervals(strategy.root_device)
            strategy.listen(self._intervals)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._intervals is None or not lightning_private.ends_accumulation(trainer):
            return
        strategy: Any = trainer.strategy
        strategy.stop_listening(self._intervals)
        layout, rank = strategy.layout, trainer.global_rank
        mine = RankTimeline(rank, layout.coordinates(rank), spans(self._intervals.take(), layout))
        self._intervals = None
        everyone = collectives.gather(mine.shifted(self._ahead), process_groups.gloo_world())
        if trainer.is_global_zero:
            start = min(span.start for each in everyone for span in each.spans)
            self._write([each.shifted(start) for each in everyone], layout, trainer.global_step)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._intervals = None

    def _write(self, timelines: list[RankTimeline], layout: Any, step: int) -> None:
        picture = draw(timelines, layout, self._folder / f"step-{step}.png", f"step {step}")
        (path := picture.with_suffix(".json")).write_text(json.dumps(trace(timelines, layout)))
        self.written += [picture, path]
        rank_zero_info(f"PipelineTimeline: {picture}, and {path} for https://ui.perfetto.dev.")


def _meet(trainer: pl.Trainer) -> float:
    """Wait for all ranks, and return the time."""
    for _ in range(2):  # the first also waits for connections to be made
        trainer.strategy.barrier()
    return time.monotonic()
