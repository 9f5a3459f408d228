"""``ExitInterval`` and ``SaveAtEnd``: end a run before its last step, and save its end."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_megatron.checkpoint.model_checkpoint import checkpoint_callbacks
from lightning_megatron.distributed import lightning_private
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.strategy import preemption


@answer_wrong_names
class ExitInterval(Callback):
    """Ends the run after each optimizer step that is a multiple of ``steps``, as Megatron's ``--exit-interval``.

    ``Trainer(max_steps=)`` stays the whole training's, and so do schedules; a resumed run goes on to the next multiple.

    Args:
        steps: Optimizer steps.

    Raises:
        ValueError: There are none.
    """

    def __init__(self, steps: int) -> None:
        Arguments("ExitInterval").whole(steps=steps)
        self.steps = steps

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if lightning_private.ends_accumulation(trainer) and trainer.global_step % self.steps == 0:
            trainer.should_stop = True


class SaveAtEnd(Callback):
    """Saves the step at which a run ends, as Megatron does, where ``ckpt_path="last"`` looks; unless it is saved.

    ``ModelCheckpoint(save_last=True)`` says where to, and alone saves the end only of a run that has saved nothing
    before. Without one nothing is saved.
    """

    @override
    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        saved = {lightning_private.last_saved_step(callback) for callback in checkpoint_callbacks(trainer)}
        path = preemption.last_path(trainer)
        if path is not None and trainer.global_step not in saved:
            trainer.save_checkpoint(path)
