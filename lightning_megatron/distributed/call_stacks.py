"""Finds the user's own line in a call stack or a traceback, among those of the libraries."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = f"{Path(__file__).parents[1]}/"
_NOT_THE_USERS = ("site-packages", _PACKAGE, sysconfig.get_paths()["stdlib"], "<frozen")
_IN_WORKER = "in DataLoader worker process"
_LINE_OF_TRACEBACK = re.compile(r'^ *File "(.+)", line (\d+), in (.+)$', re.MULTILINE)


def of_error(error: BaseException) -> list[traceback.FrameSummary]:
    """The calls that led to an error, the innermost last; in a DataLoader's worker, where it was raised there."""
    if _IN_WORKER in str(error):  # torch hands on the text of the worker's traceback
        found = _LINE_OF_TRACEBACK.findall(str(error))
        return [traceback.FrameSummary(file, int(line), name) for file, line, name in found]
    return list(traceback.extract_tb(error.__traceback__))


def what(error: BaseException) -> str:
    """The kind and the text of an error, as the last lines of a traceback have them."""
    text = str(error).strip()
    if _IN_WORKER in text:
        return f"{text.splitlines()[-1]} (in a worker of the DataLoader)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def users(calls: Iterable[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The innermost call of the user's code under the Trainer; without one, of this package; without any, the last."""
    calls = list(calls)
    under = [number for number, call in enumerate(calls) if "lightning/pytorch/trainer" in call.filename]
    inside = calls[under[0] :] if under else calls
    own = [call for call in inside if not any(part in call.filename for part in _NOT_THE_USERS)]
    ours = [call for call in inside if call.filename.startswith(_PACKAGE)]
    chosen = own or ours or inside
    return chosen[-1] if chosen else None


def shown(call: traceback.FrameSummary) -> str:
    """A call as its function and the short name of its file."""
    return f"{call.name} ({call.filename.rsplit('site-packages/')[-1]}:{call.lineno})"
