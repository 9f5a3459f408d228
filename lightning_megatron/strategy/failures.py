"""Explains the error that ends a run: which rank failed first, for whom others waited, and what takes less memory."""

from __future__ import annotations

from typing import Any

from lightning_megatron.distributed import call_stacks, crash_report, first_error, heartbeat
from lightning_megatron.strategy.launchers.crash_file import crash_file


def explain(error: BaseException, strategy: Any) -> None:
    """Add notes to an error, and have it told in a few lines if nobody catches it.

    Args:
        error: The error that ends the run on this rank.
        strategy: The strategy of the run.
    """
    first: dict[str, Any] | None = first_error.record(error, call_stacks.what(error), crash_report.place_of(error))
    heartbeat.explain_timeout(error, strategy.layout)
    strategy.explain_out_of_memory(error)
    environment = strategy.cluster_environment
    if environment is not None and environment.creates_processes_externally:  # which it says of ranks that run
        crash_report.prepare(error, strategy.layout, strategy.global_rank, first, crash_file(strategy))
