"""The strategy's hooks for checkpoints: what is loaded before a run, and saved and removed during it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_megatron.checkpoint import Checkpointer, Run, local_path
from lightning_megatron.distributed import first_error
from lightning_megatron.strategy import launchers, single_rank
from lightning_megatron.strategy.module_setup import ModuleSetup
from lightning_megatron.training import timers
from lightning_megatron.training.resumed_settings import ResumedSettings


class CheckpointHooks(ModuleSetup):
    """The part of the strategy that loads, saves and removes checkpoints, on all ranks together."""

    checkpointer: Checkpointer
    _resumed_settings: ResumedSettings
    _ranks_have_met: bool

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """A plain module on one rank is loaded before, as without this strategy; others have no weights before."""
        return not self._is_plain_alone

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if self._is_not_set_up and not self._ranks_have_met:
            return super().load_checkpoint(local_path(checkpoint_path), weights_only)
        return self.checkpointer.load(local_path(self.broadcast(checkpoint_path)), self._run, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        if self._sharded is not None:
            self._sharded.inner.reload_model_params()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        optimizer: Any = self._sharded or self._whole_optimizer
        if optimizer is None:
            super().load_optimizer_state_dict(checkpoint)
        elif checkpoint["optimizer_states"]:
            self.checkpointer.convert_optimizer_states(checkpoint, self._run)  # type: ignore[arg-type]
            schedulers = [config.scheduler for config in self.lr_scheduler_configs]
            self._resumed_settings.choose(optimizer, schedulers, checkpoint)  # type: ignore[arg-type]
            (state,) = checkpoint["optimizer_states"]
            optimizer.load_state_dict(state["hyper"])
            state["finish"]()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if launchers.kept_checkpoint(self):
            return {}  # the ranks have ended; `save_checkpoint` copies the checkpoint that they left
        first_error.wait_for_all_ranks_in_handler()
        if self._engine is not None:  # otherwise no run has been set up yet
            self._engine.finish_param_gather()
            self._engine.share_buffers()
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} writes to local paths and takes no storage_options.")
        if kept := launchers.kept_checkpoint(self):
            kept.copy_to(local_path(filepath), checkpoint)
            return
        if self._is_not_set_up:
            super().save_checkpoint(checkpoint, local_path(filepath))
            return
        first_error.wait_for_all_ranks_in_handler()
        with timers.timed(self.engine.timers, timers.SAVE):
            self.checkpointer.save(checkpoint, local_path(self.broadcast(filepath)), self._run)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        self.checkpointer.saves.remove(local_path(filepath))

    def _begin_run(self) -> None:
        """Forget what an earlier fit has loaded before this one loads; an evaluation keeps it, for a later save."""
        self._ranks_have_met = True
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:  # type: ignore[union-attr]
            self.checkpointer.begin_fit()
            self.optimizers, self._whole_optimizer = [], None

    @property
    def _is_not_set_up(self) -> bool:
        """Whether there is no run, and no module or a plain one on one rank: Lightning then saves and loads."""
        return self._engine is None and self._ranks == 1 and not self._has_megatron_module

    @property
    def _run(self) -> Run:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        in_one_file = single_rank.is_single_rank(trainer) and not self.checkpointer.asynchronous
        return Run(
            trainer, self.layout, self._sharded or self._whole_optimizer, not self._has_megatron_module, in_one_file
        )
