"""Tells in a few lines which rank of a run failed, where and why; the tracebacks of all ranks go to a file.

Each rank of a failed run would print a traceback of ninety lines, most of them about a lost connection. ``prepare``
leaves an error as it is, for whoever catches it, and has it told in short if nobody does.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import linecache
import os
import platform
import re
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_megatron.distributed import call_stacks
from lightning_megatron.distributed.layout import ParallelLayout

LAUNCHER = "LIGHTNING_MEGATRON_LAUNCHER"  # the process that has started the ranks, is one of them, and tells at its end
_REPORT = "lightning_megatron_report"  # the attribute of an error that is told in short
_ATTEMPT = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RESTART_COUNT")  # what one process may start several of
SECONDS_OF_STORE = 1.5  # which rank 0 keeps, and in which other ranks that fail look for the first error
_SENT = 'File "<dynamic-code>"'  # what cloudpickle calls the file of a class that it sends
_END = "\n\n"  # of the summary, in the file
_LONGEST = 300  # characters of a line
_MOST = 24  # lines of an error whose text has several
_SLACK = 60.0  # seconds between the starts of the ranks of one run
_CPP_STACK = "\nException raised from "  # torch's own, behind the text of some errors


@dataclass(frozen=True)
class Failure:
    """An error of a rank, in words.

    Args:
        rank: The rank's number and coordinates.
        world_size: Number of ranks.
        what: The error's kind and text.
        place: The user's line at which it was raised.
        notes: What the strategy has found out about it.
    """

    rank: str
    world_size: int
    what: str
    place: str = ""
    notes: tuple[str, ...] = ()

    def summary(self, file: object) -> str:
        """The failure in at most six lines; in front of them an error or a note of several lines."""
        what = self.what.partition(_CPP_STACK)[0]
        long = [line for text in (what, *self.notes) if "\n" in text for line in text.splitlines()]
        if len(long) > _MOST:
            long[_MOST:] = ["..."]
        first_line, _, more = what.partition("\n")
        short = [self.place, first_line + (" ..." if more else ""), *(note for note in self.notes if "\n" not in note)]
        begin = f"MegatronStrategy: of {self.world_size} ranks, {self.rank} failed first."
        told = [f"  {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}" for text in short[:4] if text]
        return "\n".join([*long, begin, *told, f"  Tracebacks: {file}"])

    @property
    def is_interrupt(self) -> bool:
        """Whether it is Ctrl-C, of which the Trainer tells."""
        return self.what.startswith("KeyboardInterrupt")


@dataclass(frozen=True)
class Report:
    """What is told of an error that nobody catches.

    Args:
        failure: What is printed.
        file: Where the tracebacks go.
        tracebacks: What the file gets; None is the error's own traceback.
        is_consequence: Whether ``failure`` is another rank's.
    """

    failure: Failure
    file: CrashFile
    tracebacks: str | None = None
    is_consequence: bool = False


class CrashFile:
    """The file to which the ranks of a machine write how they failed. The first to write puts a summary into its head.

    Args:
        folder: Where it is to be; without it, or without the right to write there, the system's temporary folder.
        since: When this run began, in seconds since the epoch: an older file is another run's.
        key: What tells the run from others. By default it is the process that the ranks of this machine have in common:
            the one that has started them.
    """

    def __init__(self, folder: str | Path, since: float, key: object = None) -> None:
        usable = os.access(folder, os.W_OK)
        key = key or os.environ.get(LAUNCHER) or os.getppid()
        attempt = [os.environ[name] for name in _ATTEMPT if name in os.environ]
        name = "_".join(["crash", platform.node(), str(key), *attempt])
        self.path = Path(folder if usable else tempfile.gettempdir()).absolute() / f"{name}.txt"
        self._since = since

    def add(self, failure: Failure, tracebacks: str) -> str | None:
        """Write the tracebacks; the summary if this is the first to write, else None."""
        with self.path.open("a") as file:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_mtime < self._since - _SLACK:
                file.truncate(0)
            is_first = not file.seek(0, os.SEEK_END)  # another rank may have written since the file was opened
            summary = failure.summary(self.path) if is_first else None
            if summary:
                file.write(f"{summary}{_END}{time.ctime()}\n")
            file.write(tracebacks)
        return summary

    def read_summary(self) -> str | None:
        """The summary, if a rank of this run has written one."""
        try:
            if self.path.stat().st_mtime < self._since - _SLACK:
                return None
            return self.path.read_text().partition(_END)[0]
        except OSError:
            return None


def prepare(
    error: BaseException, layout: ParallelLayout, rank: int, first: dict[str, Any] | None, file: CrashFile
) -> None:
    """Have an error told in a few lines if nobody catches it.

    Args:
        error: This rank's error, with its notes.
        layout: The parallel sizes of the run; the error of a run of one rank is told by Python as ever.
        rank: This rank's number.
        first: The error of another rank that it follows from, as ``first_error.record`` returns it.
        file: Where the tracebacks go.
    """
    known = report_of(error)
    if layout.world_size == 1 or (known is not None and known.tracebacks is not None):  # a launcher has brought it
        return
    if first is not None:
        failure = Failure(layout.rank_name(first["rank"]), layout.world_size, first["what"], first["place"])
    else:
        notes = tuple(getattr(error, "__notes__", ()))
        failure = Failure(layout.rank_name(rank), layout.world_size, call_stacks.what(error), place_of(error), notes)
    tell_in_short(error, Report(failure, file, None, first is not None))
    if rank == 0 and LAUNCHER not in os.environ:
        atexit.register(time.sleep, SECONDS_OF_STORE)


def tell_in_short(error: BaseException, report: Report) -> None:
    """Have ``report`` told instead of an error's traceback if nobody catches the error, in a notebook's cell, too."""
    error.__dict__[_REPORT] = report
    error.__dict__["_render_traceback_"] = partial(_cell_output, error)  # IPython asks an error for it
    if not isinstance(sys.excepthook, partial) or sys.excepthook.func is not _tell:
        sys.excepthook = partial(_tell, sys.excepthook)


def report_of(error: BaseException) -> Report | None:
    """What is told of an error, once a run has failed with it."""
    report: Report | None = error.__dict__.get(_REPORT)
    return report


def is_consequence(error: BaseException) -> bool:
    """Whether another rank's error is told in the place of this one."""
    report = report_of(error)
    return report is not None and report.is_consequence


def how_it_ended(code: int) -> str:
    """What is known of a process that has ended without a Python error, by its exit code."""
    if code > 0:
        return f"It ended with exit code {code}, without a Python error."
    why = " This often means that the machine ran out of memory: `dmesg` says so." if -code == signal.SIGKILL else ""
    return f"It was ended by {signal.Signals(-code).name}, without a Python error.{why}"


def place_of(error: BaseException) -> str:
    """The user's line at which an error was raised, as Python shows it, in one line."""
    call = call_stacks.users(call_stacks.of_error(error))
    if call is None:
        return ""
    line = (call.line or linecache.getline(call.filename, call.lineno or 0)).strip()
    return f'File "{call.filename}", line {call.lineno}, in {call.name}{": " if line else ""}{line}'


def in_main_script(place: str) -> str:
    """The place of code that was sent to a rank, which has no file there: a line of the script, or of a notebook."""
    if not place.startswith(_SENT):
        return place
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:
        return f"in a cell of the notebook{place.removeprefix(_SENT)}"
    number = re.search(r"line (\d+)", place)
    line = linecache.getline(file, int(number[1])).strip() if number else ""
    return f'File "{os.path.abspath(file)}"{place.removeprefix(_SENT)}{": " if line else ""}{line}'


def tell(error: BaseException) -> bool:
    """Tell of an error that a run has failed with, unless another rank does; False if no run has."""
    report = next((found for cause in _chain(error) if (found := report_of(cause))), None)
    if report is None:
        return False
    if report.failure.is_interrupt:
        return True
    sys.stdout.flush()
    if report.tracebacks is None:  # this rank is about to end; torchrun must not end it in the middle of its words
        with contextlib.suppress(ValueError):  # signals are the main thread's
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        summary = _written(error, report)
    except OSError:
        return False
    if summary:
        _tell_torchrun(summary)
        if not _launcher_tells():
            print(f"\n{summary}", file=sys.stderr, flush=True)
    return True


def _tell(otherwise: Any, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """The ``sys.excepthook`` of a process in which a run has failed."""
    if not tell(error):
        otherwise(kind, error, trace)


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error, and those that it was raised from or while handling."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _written(error: BaseException, report: Report) -> str | None:
    """Write an error to the file; the summary where no other rank has told it."""
    tracebacks = report.tracebacks
    if tracebacks is None:
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK", "0")
        tracebacks = f"\nRank {rank}, process {os.getpid()}\n{''.join(traceback.format_exception(error))}"
    return report.file.add(report.failure, tracebacks)


def _cell_output(error: BaseException) -> list[str]:
    report: Report = error.__dict__[_REPORT]
    _written(error, report)
    return report.failure.summary(report.file.path).splitlines()


def _launcher_tells() -> bool:
    """Whether the process that has started this rank still runs: it tells at its end, below all other output."""
    with contextlib.suppress(KeyError, ValueError, ProcessLookupError):
        os.kill(int(os.environ[LAUNCHER]), 0)
        return True
    return False


def _tell_torchrun(summary: str) -> None:
    """Have torchrun's own report end with the summary; it takes the earliest error for the cause, by the second."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": summary, "extraInfo": {"timestamp": str(int(time.time()) - 1)}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": told}))
