"""Progress bars of the whole training, in optimizer steps: the loss, tokens a second, and when it ends."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override

from lightning_megatron.distributed import lightning_private
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.models.megatron_module import MegatronModule
from lightning_megatron.training.batch_rows import count_rows

_WINDOW = 20  # optimizer steps that the speed is over


class _OfTraining(ProgressBar):
    """How far training is, and how fast; of rank 0 alone, whose replica reads as much as any."""

    def __init__(self, refresh_rate: int) -> None:
        Arguments(type(self).__name__).whole(0, refresh_rate=refresh_rate)
        super().__init__(refresh_rate=refresh_rate)  # type: ignore[call-arg]  # the bar's, which comes next
        self._steps: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._tokens = 0

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.training:
            self._begin()

    @override
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The values that the bar shows, without the logger's version."""
        shown: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        shown.pop("v_num", None)
        seconds = self._steps[-1][0] - self._steps[0][0] if self._steps else 0.0
        tokens = sum(tokens for _, tokens in list(self._steps)[1:])
        if seconds and tokens:
            shown["tokens/s"] = f"{tokens / seconds:,.0f}"
        return shown

    def _begin(self) -> None:
        """Training, or a stretch of it, begins."""
        self._steps.clear()
        self._steps.append((time.monotonic(), 0))
        self._tokens = 0

    def _see(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> bool:
        """Count a batch, and return whether an optimizer step has ended with it."""
        if isinstance(module, MegatronModule):
            replicas = trainer.strategy.layout.dp  # type: ignore[attr-defined]
            self._tokens += count_rows(batch) * sum(module.lengths(batch)) * replicas
        if not lightning_private.ends_accumulation(trainer):
            return False
        self._steps.append((time.monotonic(), self._tokens))
        self._tokens = 0
        return True


def _total(trainer: pl.Trainer) -> int | None:
    """Number of optimizer steps of the run; None if it is unknown."""
    steps = trainer.estimated_stepping_batches
    return None if math.isinf(steps) else int(steps)


@answer_wrong_names
class TrainingProgressBar(_OfTraining, TQDMProgressBar):
    """A bar from the first optimizer step of the run to the last, by tqdm; validation has its own below it.

    It shows the loss of the global batch, whatever else was logged with ``prog_bar=True``, tokens a second over all
    ranks, and the time that is left of the whole training, in a resumed run too.

    Args:
        refresh_rate: Optimizer steps between two updates; 0 shows nothing.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = trainer.global_step
        self.train_progress_bar = Tqdm(
            desc="Training", total=_total(trainer), initial=done, disable=self.is_disabled, leave=True,
            dynamic_ncols=True, bar_format=self.BAR_FORMAT.replace("rate_noinv_fmt", "rate_fmt"), unit="step",
        )  # fmt: skip
        self._begin()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.train_progress_bar.set_description(f"Training (epoch {trainer.current_epoch})")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar = self.train_progress_bar
        if self._see(trainer, pl_module, batch) and lightning_private.bar_is_due(self, trainer.global_step, bar.total):
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(trainer.global_step - bar.n)


@answer_wrong_names
class RichTrainingProgressBar(_OfTraining, RichProgressBar):
    """As ``TrainingProgressBar``, by rich (``pip install rich``).

    Args:
        refresh_rate: Updates a second; 0 shows nothing.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._begin()
        if self.progress is not None:
            self.train_progress_bar_id = self.progress.add_task(
                "Training", total=_total(trainer), completed=trainer.global_step
            )

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=f"Training (epoch {trainer.current_epoch})")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._see(trainer, pl_module, batch):
            lightning_private.update_rich_bar(self, self.train_progress_bar_id, trainer.global_step, trainer, pl_module)
