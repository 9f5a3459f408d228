"""Runs one call in each of several processes, which start from a preloaded server and end together."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import cloudpickle

from lightning_megatron.distributed import crash_report, first_error, rank_server
from lightning_megatron.distributed.crash_report import Failure

_GRACE = 5.0  # seconds in which ranks may end by themselves after one has failed, before they are killed
_GRACE_AFTER_INTERRUPT = 15.0  # seconds after Ctrl-C, in which callbacks may save something


class RankTraceback(Exception):
    """Shows the traceback of an error on a rank, as the cause of the error that the caller sees.

    Args:
        text: The rank, and its traceback.
        failure: The error in short.
        all_ranks: The tracebacks of all ranks.
    """

    def __init__(self, text: str, failure: Failure | None, all_ranks: str) -> None:
        super().__init__(text)
        self.failure = failure
        self.all_ranks = all_ranks

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class RankDiedError(RuntimeError):
    """Raised when a rank ended without a Python error: it was killed, or crashed outside of Python.

    Args:
        rank: The rank.
        code: Its exit code.
        all_ranks: The tracebacks of the other ranks.
    """

    def __init__(self, rank: int, code: int, all_ranks: str) -> None:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        super().__init__(
            f"MegatronStrategy: rank {rank} {how}, without a Python error; the other ranks were ended."
            " SIGKILL often means that the machine ran out of memory."
        )
        self.rank, self.code, self.all_ranks = rank, code, all_ranks


@dataclass(frozen=True)
class _Failure:
    """An error on a rank, in the form in which it is sent to the caller."""

    rank: int
    when: float
    is_consequence: bool
    pickled: bytes | None
    text: str
    short: str
    told: Failure | None

    def error(self, all_ranks: str) -> BaseException:
        try:
            error = pickle.loads(self.pickled) if self.pickled else None
        except Exception:
            error = None
        if not isinstance(error, Exception):  # SystemExit and KeyboardInterrupt would end the caller's session
            error = RuntimeError(f"rank {self.rank} raised {self.short}")
        error.add_note(f"Raised on rank {self.rank}; its traceback is above.")
        error.__cause__ = RankTraceback(f"rank {self.rank}: {self.text}", self.told, all_ranks)
        return error


def run(call: Callable[[], Any], environments: Sequence[Mapping[str, str]]) -> list[Any]:
    """Run ``call`` in one process for each environment.

    When one process fails, the others are ended; so they are after Ctrl-C, and when this process is killed.

    Args:
        call: The function, which cloudpickle sends, so that it may be defined in a notebook or in ``__main__``.
        environments: The environment variables of each process, which has no others.

    Returns:
        What each process returned, in the order of ``environments``.

    Raises:
        RankDiedError: A process ended without a Python error; the message names it.
        Exception: The first error of any process, with its traceback.
    """
    # By this, torch asks NVML whether there are GPUs. A server that has asked CUDA has children that cannot use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    if _is_untouched(forkserver._forkserver):
        context.set_forkserver_preload(rank_server.PRELOADED)
    with tempfile.TemporaryDirectory(prefix="lightning_megatron_") as name:
        folder = Path(name)
        (folder / "call").write_bytes(_pickle(call))
        processes = [
            context.Process(target=_rank, name=f"rank {rank}", args=(rank, folder, dict(environment)))
            for rank, environment in enumerate(environments)
        ]
        try:
            for process in processes:
                process.start()
            died = _wait(processes)
        except BaseException:  # above all Ctrl-C, which a notebook sends to its kernel only
            _signal(processes, signal.SIGINT)
            _join(processes, _GRACE_AFTER_INTERRUPT)
            raise
        finally:
            _signal(processes, signal.SIGKILL)
            _join(processes, None)
        outcomes = [_read(folder / str(rank)) for rank in range(len(processes))]
    _raise_first(outcomes, died)
    return outcomes


def _is_untouched(server: Any) -> bool:
    """Whether the server still has its default list of modules to preload (private in CPython 3.11 to 3.14)."""
    return bool(server._preload_modules == ["__main__"])


def _pickle(call: Any) -> bytes:
    try:
        return bytes(cloudpickle.dumps(call))
    except Exception as error:
        raise TypeError(
            f"launch='forkserver' sends the Trainer, the module and the data to the ranks, and something in them cannot"
            f" be pickled: {error}. Make it in setup() or configure_model(), which run on the ranks."
        ) from error


def _wait(processes: list[Any]) -> dict[int, int]:
    """Wait for all to end, or ``_GRACE`` seconds after one has failed; return the exit codes of those that failed."""
    failed: dict[int, int] = {}
    running = dict(enumerate(processes))
    deadline: float | None = None
    while running and (deadline is None or time.monotonic() < deadline):
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = connection.wait([process.sentinel for process in running.values()], patience)
        for rank in [rank for rank, process in running.items() if process.sentinel in ended]:
            process = running.pop(rank)
            process.join()
            if process.exitcode:
                failed[rank] = process.exitcode
                deadline = deadline or time.monotonic() + _GRACE
    return failed


def _raise_first(outcomes: list[Any], died: Mapping[int, int]) -> None:
    failures = [outcome for outcome in outcomes if isinstance(outcome, _Failure)]
    silent = {rank: code for rank, code in died.items() if not isinstance(outcomes[rank], _Failure)}
    killed = {rank: code for rank, code in silent.items() if -code != signal.SIGABRT}
    all_ranks = "\n".join(f"rank {failure.rank}: {failure.text}" for failure in failures)
    # Gloo aborts when a peer is gone, so an abort counts as the cause only when no rank has raised an error.
    if killed or (silent and not failures):
        rank, code = next(iter((killed or silent).items()))
        raise RankDiedError(rank, code, all_ranks)
    if failures:
        raise min(failures, key=lambda failure: (failure.is_consequence, failure.when)).error(all_ranks)


def _signal(processes: list[Any], number: signal.Signals) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, number)


def _join(processes: list[Any], seconds: float | None) -> None:
    deadline = None if seconds is None else time.monotonic() + seconds
    for process in processes:
        if process.pid is not None:
            process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else None


# Runs in the processes


def _rank(rank: int, folder: Path, environment: dict[str, str]) -> None:
    rank_server.take_interrupts()
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    os.environ.clear()  # a forked process has the variables that the server had when it started
    os.environ.update(environment)
    failure = None
    try:
        outcome = cloudpickle.dumps(pickle.loads((folder / "call").read_bytes())())
    except BaseException as error:
        failure = error
        outcome = pickle.dumps(_describe(rank, error))
    unfinished = folder / f"{rank}.unfinished"
    unfinished.write_bytes(outcome)
    unfinished.rename(folder / str(rank))
    if failure is not None:
        if rank == 0:
            time.sleep(crash_report.SECONDS_OF_STORE)
        sys.exit(1)


def _end_with_the_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _describe(rank: int, error: BaseException) -> _Failure:
    text = "".join(traceback.format_exception(error))
    try:
        pickled = cloudpickle.dumps(error)
    except Exception:
        pickled = None
    short, report = f"{type(error).__name__}: {error}", crash_report.report_of(error)
    told = report.failure if report else None
    return _Failure(rank, time.time(), first_error.is_consequence(error), pickled, text, short, told)
