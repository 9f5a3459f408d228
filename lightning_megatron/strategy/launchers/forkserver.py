"""Lightning's launcher of processes that are not copies of a script, over a preloaded server."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers.multiprocessing import _check_missing_main_guard
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot, _MultiProcessingLauncher
from lightning.pytorch.trainer.call import _call_and_handle_interrupt
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_megatron.strategy.launchers import worker_pool
from lightning_megatron.strategy.launchers.returned_state import Baseline, HandedBack, KeptCheckpoint


class ForkserverLauncher(_MultiProcessingLauncher):
    """Starts the ranks of a run from a preloaded server, and hands back what they made.

    What the caller holds is sent to every rank; of a rank's memory nothing is left after a run. So a fit leaves a
    checkpoint, each rank its shard, in a temporary folder: a later run puts the weights back from it, and
    ``trainer.save_checkpoint`` copies it.

    Args:
        strategy: Whose ranks these are.
    """

    def __init__(self, strategy: pl.strategies.ParallelStrategy) -> None:
        super().__init__(strategy, start_method="forkserver")
        if getattr(strategy, "num_nodes", 1) > 1:
            raise MisconfigurationException(
                f"MegatronStrategy(launch='forkserver') starts the ranks of one machine, and num_nodes="
                f"{strategy.num_nodes}. Start a script by torchrun or SLURM on each."  # type: ignore[attr-defined]
            )
        self.kept: KeptCheckpoint | None = None

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Call ``function`` on every rank; what it returned on rank 0.

        Args:
            function: A Trainer's method, or with no ``trainer`` any function.
            *args: Its arguments.
            trainer: Takes over rank 0's state.
            **kwargs: Its keyword arguments.
        """
        _check_missing_main_guard()
        fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        kept = KeptCheckpoint() if fits else None
        states = _GlobalStateSnapshot.capture()
        call = partial(_on_rank, self._strategy, states, partial(function, *args, **kwargs), trainer, kept)
        ranks = range(self._strategy.num_processes)  # type: ignore[attr-defined]
        outcome = worker_pool.run(call, [{**os.environ, **self._places(), "LOCAL_RANK": str(rank)} for rank in ranks])[
            0
        ]
        if trainer is None:
            return outcome
        if kept is not None:
            self.kept = kept
        assert isinstance(outcome, HandedBack)
        outcome.give_to(trainer, kept)
        return outcome.results

    def _places(self) -> dict[str, str]:
        environment = self._strategy.cluster_environment
        assert environment is not None
        return {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}


def _on_rank(
    strategy: Any,
    states: _GlobalStateSnapshot,
    function: Callable[[], Any],
    trainer: pl.Trainer | None,
    kept: KeptCheckpoint | None,
) -> Any:
    states.restore()
    _set_num_threads_if_needed(num_processes=strategy.num_processes)
    strategy._launcher = None  # the processes are there
    strategy.set_world_ranks()  # so that what is for rank 0 is said once, from the start
    if trainer is None:
        return function()
    baseline = Baseline.of(trainer)
    results = _call_and_handle_interrupt(trainer, function)
    if kept is not None:
        trainer.save_checkpoint(kept.path)
        strategy.checkpointer.wait()
    outcome = baseline.collect(trainer, results) if strategy.global_rank == 0 else None
    if dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.destroy_process_group()
    return outcome
