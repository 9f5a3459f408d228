"""Launches the ranks from a preloaded server, for notebooks, which have no script to run again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_megatron.distributed import crash_report, lightning_private
from lightning_megatron.strategy import plain_module
from lightning_megatron.strategy.launchers import worker_pool
from lightning_megatron.strategy.launchers.crash_file import crash_file
from lightning_megatron.strategy.launchers.returned_state import Baseline, KeptCheckpoint, RunResult


class ForkserverLauncher(lightning_private.MultiProcessingLauncher):
    """Starts the ranks of a run from a preloaded server, and brings their results back.

    The Trainer, the module and the data are sent to every rank. A rank's memory is gone after a run, so each rank of a
    fit writes its shard of a checkpoint into a temporary folder. A later run restores the weights from it, and
    ``trainer.save_checkpoint`` copies it.

    Args:
        strategy: The strategy whose ranks are started.
    """

    def __init__(self, strategy: pl.strategies.ParallelStrategy) -> None:
        super().__init__(strategy, start_method="forkserver")
        if getattr(strategy, "num_nodes", 1) > 1:
            raise MisconfigurationException(
                f"MegatronStrategy(launch='forkserver') starts the ranks of one machine, and num_nodes is"
                f" {strategy.num_nodes}. Start a script with torchrun or SLURM on each machine."  # type: ignore[attr-defined]
            )
        self.kept: KeptCheckpoint | None = None

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Call ``function`` on every rank.

        Args:
            function: A method of the Trainer, or any function if there is no ``trainer``.
            *args: Positional arguments of the call.
            trainer: The caller's Trainer, which takes over the state of rank 0's.
            **kwargs: Keyword arguments of the call.

        Returns:
            What the call returned on rank 0.
        """
        strategy: Any = lightning_private.strategy_of(self)
        plain_module.check_arguments(args, strategy)
        lightning_private.check_missing_main_guard()
        fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        kept = KeptCheckpoint() if fits else None
        states = lightning_private.GlobalStateSnapshot.capture()
        call = partial(_on_rank, strategy, states, partial(function, *args, **kwargs), trainer, kept)
        places = [{**os.environ, **self._places(), "LOCAL_RANK": str(rank)} for rank in range(strategy.num_processes)]
        try:
            outcome = worker_pool.run(call, places)[0]
        except Exception as error:
            if trainer is not None:
                _tell_in_short(error, strategy)
            raise
        if trainer is None:
            return outcome
        if kept is not None:
            self.kept = kept
        assert isinstance(outcome, RunResult)
        outcome.give_to(trainer, kept)
        return outcome.results

    def _places(self) -> dict[str, str]:
        environment = lightning_private.strategy_of(self).cluster_environment
        assert environment is not None
        return {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}


def _tell_in_short(error: Exception, strategy: Any) -> None:
    """Have the error of a rank told in a few lines if nobody catches it."""
    layout, cause = strategy.layout, error.__cause__
    if isinstance(error, worker_pool.RankDiedError):
        name, ended = layout.rank_name(error.rank), crash_report.how_it_ended(error.code)
        failure, tracebacks = crash_report.Failure(name, layout.world_size, ended), error.all_ranks
    elif isinstance(cause, worker_pool.RankTraceback) and cause.failure is not None:
        place = crash_report.in_main_script(cause.failure.place)
        failure, tracebacks = replace(cause.failure, place=place), cause.all_ranks
    else:
        return
    file = crash_file(strategy, key=f"{os.getpid()}_{time.time():.0f}")
    crash_report.tell_in_short(error, crash_report.Report(failure, file, tracebacks))


def _on_rank(
    strategy: Any,
    states: lightning_private.GlobalStateSnapshot,
    function: Callable[[], Any],
    trainer: pl.Trainer | None,
    kept: KeptCheckpoint | None,
) -> Any:
    states.restore()
    lightning_private.set_num_threads(num_processes=strategy.num_processes)
    lightning_private.set_launcher(strategy, None)  # the processes run already
    strategy.set_world_ranks()  # so that only rank 0 logs and warns, from the start
    if trainer is None:
        return function()
    baseline = Baseline.of(trainer)
    results = lightning_private.call_and_handle_interrupt(trainer, function)
    if kept is not None:
        trainer.save_checkpoint(kept.path)
        strategy.checkpointer.wait()
    outcome = baseline.collect(trainer, results) if strategy.global_rank == 0 else None
    if dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.destroy_process_group()
    return outcome
