"""Everything that the strategy replaces in a Trainer's objects for a run, in one table, and undoes when the run ends.

``TrainerPatches.apply`` is the table: each line replaces a method or attribute of a loop, connector, callback, profiler
or metric. Loaders are made later, and their attributes are replaced one by one. The strategy's ``teardown``, which
Lightning calls after an error too, undoes all of it, so that these objects work in a plain Trainer afterwards.

The results of a run stay: the progress of the loops, the loaders that the fit loop has read (a later save records their
position), metrics, and the checkpoints that a ModelCheckpoint has saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_megatron.checkpoint import Checkpointer, model_checkpoint
from lightning_megatron.distributed import lightning_private
from lightning_megatron.strategy import model_summary, optimization_loop, progress_bar
from lightning_megatron.strategy.dataloading import evaluation_sampler
from lightning_megatron.strategy.logging import torchmetrics_sync

if TYPE_CHECKING:
    from lightning_megatron.strategy.logging.hook_values import HookLogs
    from lightning_megatron.strategy.preemption import Preemption


@dataclass
class _Replaced:
    """One entry of the undo list.

    Args:
        owner: The object.
        name: The name of its attribute.
        had_own: Whether the object itself had the attribute; otherwise its class's shows again.
        old: The value that the object had.
    """

    owner: Any
    name: str
    had_own: bool
    old: Any


class TrainerPatches:
    """The replaced attributes of one Trainer's objects, with the list that undoes them."""

    def __init__(self) -> None:
        self._replaced: list[_Replaced] = []

    def apply(
        self,
        trainer: pl.Trainer,
        checkpointer: Checkpointer,
        preemption: Preemption,
        hook_logs: HookLogs | None,
        after_backward: Callable[[], None] | None,
    ) -> None:
        """Replace everything but the loaders' attributes, once it is known how the module is trained.

        Args:
            trainer: The Trainer.
            checkpointer: It goes on in the data at a resume, and answers ModelCheckpoint.
            preemption: It acts on signals after each batch.
            hook_logs: It shares the values that hooks log; None where there are no other ranks.
            after_backward: It is called between the hooks around the backward pass that a schedule has run; None where
                Lightning's own loop trains the module.
        """
        replace, epoch_loop = self.replace, trainer.fit_loop.epoch_loop
        if after_backward is not None:
            replace(epoch_loop, "automatic_optimization", optimization_loop.ScheduleOptimization(trainer))
            replace(trainer.strategy.precision_plugin, "after_backward", after_backward)
        replace(epoch_loop, "update_lr_schedulers", partial(optimization_loop.update_lr_schedulers, trainer))
        replace(epoch_loop, "advance", partial(checkpointer.resumption.advance, trainer, replace))
        replace(epoch_loop, "on_advance_end", preemption.end_advance)
        # Tensors that megatron-core caches in inference mode would break a later fit; under NCCL only.
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            replace(loop, "inference_mode", False)

        # No local function, here and elsewhere: a Trainer may be pickled.
        resolve_sampler = partial(evaluation_sampler.resolve_sampler, trainer)
        replace(lightning_private.data_connector(trainer), lightning_private.RESOLVE_SAMPLER, resolve_sampler)

        for summary in model_summary.callbacks_to_replace(trainer):
            depth = lightning_private.summary_depth(summary)
            replace(summary, lightning_private.SUMMARY, partial(model_summary.summarize, depth))
            if (printer := model_summary.printer(summary)) is not None:
                replace(summary, "summarize", printer)
        for bar in progress_bar.bars_without_last_epoch(trainer):
            replace(bar, lightning_private.TRAIN_DESCRIPTION, partial(progress_bar.train_description, bar))
        for checkpoints in model_checkpoint.checkpoint_callbacks(trainer):
            if type(checkpoints).file_exists is pl.callbacks.ModelCheckpoint.file_exists:
                replace(checkpoints, "file_exists", model_checkpoint.file_exists)
            if checkpoints.save_last == "link":
                replace(checkpoints, lightning_private.LINK_CHECKPOINT, model_checkpoint.link)

        for metric in torchmetrics_sync.metrics_to_sync(trainer.lightning_module):
            replace(metric, "dist_sync_fn", partial(torchmetrics_sync.gather, metric))
        if hook_logs is not None:
            replace(trainer.lightning_module, "log", hook_logs.log)
            replace(trainer.profiler, "profile", hook_logs.profile)  # type: ignore[attr-defined]

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Have ``owner.name`` be ``new`` until ``undo``.

        Raises:
            AttributeError: There is no such attribute, so that nobody would read the new one.
        """
        getattr(owner, name)
        held = vars(owner)  # written to as it is: a DataLoader refuses assignments, a module registers what it is given
        self._replaced.append(_Replaced(owner, name, name in held, held.get(name)))
        held[name] = new

    def undo(self) -> None:
        """Put back everything that was replaced, and nothing else."""
        while self._replaced:
            last = self._replaced.pop()
            if last.had_own:
                vars(last.owner)[last.name] = last.old
            else:
                vars(last.owner).pop(last.name, None)
