"""Processes started from a preloaded server: each makes one call, and they end together. Knows nothing of training."""

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import cloudpickle

from lightning_megatron.distributed import first_error

_PRELOADED = ["lightning_megatron"]  # with it come torch, lightning.pytorch and megatron.core
_GRACE = 5.0  # seconds that ranks have to end by themselves when one has failed, before they are killed
_UNTIL_DOOM = 15.0  # the same after Ctrl-C, when callbacks may save something


class RankTraceback(Exception):
    """The traceback of an error on a rank: the cause of the error that the caller sees."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class RankDiedError(RuntimeError):
    """A rank that ended without a word: killed, or crashed outside of Python."""


@dataclass(frozen=True)
class _Failure:
    """An error on a rank, as it leaves the process."""

    rank: int
    when: float
    is_consequence: bool
    pickled: bytes | None
    text: str
    short: str

    def error(self) -> BaseException:
        try:
            error = pickle.loads(self.pickled) if self.pickled else None
        except Exception:
            error = None
        if not isinstance(error, Exception):  # SystemExit and its like would end the caller's session
            error = RuntimeError(f"rank {self.rank} raised {self.short}")
        error.add_note(f"Raised on rank {self.rank}; its traceback is above.")
        error.__cause__ = RankTraceback(f"rank {self.rank}: {self.text}")
        return error


def run(call: Callable[[], Any], environments: list[Mapping[str, str]]) -> list[Any]:
    """Make ``call`` in one process per environment, numbered in order; their results.

    When one fails the others are ended, and so they are by Ctrl-C here, or when this process is killed.

    Args:
        call: Sent by cloudpickle, so that what is defined in a notebook or in ``__main__`` goes with it.
        environments: The whole environment of each process.

    Raises:
        RankDiedError: Names a rank that was killed.
        Exception: The first error of any rank, with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    if _is_untouched(forkserver._forkserver):
        context.set_forkserver_preload(_PRELOADED)
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
        except BaseException:  # Ctrl-C above all: a terminal sends it to every process, a notebook to the kernel only
            _signal(processes, signal.SIGINT)
            _join(processes, _UNTIL_DOOM)
            raise
        finally:
            _signal(processes, signal.SIGKILL)
            _join(processes, None)
        outcomes = [_read(folder / str(rank)) for rank in range(len(processes))]
    _raise_first(outcomes, died)
    return outcomes


def _is_untouched(server: Any) -> bool:
    """Whether nobody has said yet what the server is to preload (private in CPython 3.11 to 3.14)."""
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
    """Until all have ended; soon after one has failed. Exit codes of those that failed by themselves."""
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
    # Gloo aborts when a peer is gone, so an abort is taken for the cause only when nobody has said anything.
    if killed or (silent and not failures):
        rank, code = next(iter((killed or silent).items()))
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise RankDiedError(
            f"MegatronStrategy: rank {rank} {how}, without a Python error; the other ranks were ended."
            " SIGKILL often means that the machine ran out of memory."
        )
    if failures:
        raise min(failures, key=lambda failure: (failure.is_consequence, failure.when)).error()


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


# In the processes


def _rank(rank: int, folder: Path, environment: dict[str, str]) -> None:
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    os.environ.clear()  # the server's is as old as the server
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
    return _Failure(
        rank, time.time(), first_error.is_consequence(error), pickled, text, f"{type(error).__name__}: {error}"
    )
