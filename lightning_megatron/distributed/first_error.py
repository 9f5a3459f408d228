"""Finds which rank raised first: the other ranks then fail on broken connections, and their errors say so."""

from __future__ import annotations

import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist

_KEY = "lightning_megatron/first_error_of_run"
_CONSEQUENCE = "This is a consequence. First, "
_SECONDS_FOR_ALL = 15
_SECONDS_TO_CLOSE = 0.2  # all connections of a rank that is being ended, on a busy machine
_waits = count()
T = TypeVar("T")
_run = 0


def begin_run() -> None:
    """Begin a new run: errors of earlier runs no longer count as the first. All ranks call this."""
    global _run
    _run += 1


def run_number() -> int:
    """The number of the present run, the same on all ranks."""
    return _run


def record(error: BaseException, what: str, place: str) -> dict[str, Any] | None:
    """Record ``error`` as the first of the run; if another rank raised earlier, add a note that quotes its error.

    Args:
        error: This rank's error.
        what: Its kind and text.
        place: The user's line at which it was raised.

    Returns:
        The ``rank``, ``what`` and ``place`` of the error of another rank that this one follows from, or None.
    """
    if not dist.is_initialized():
        return None
    mine = json.dumps({"rank": dist.get_rank(), "what": what, "place": place})
    try:
        told = ask_with_timeout(lambda: default_store().compare_set(f"{_KEY}_{_run}", "", mine), _SECONDS_FOR_ALL)
        first: dict[str, Any] = json.loads(told)
    except Exception:  # the store ends with rank 0, and then nobody knows which error was first
        return None
    if first["what"] == what:  # where every rank raises the same error, none is a consequence
        return None
    error.add_note(f"{_CONSEQUENCE}rank {first['rank']} raised {first['what']}")
    return first


def ask_with_timeout(question: Callable[[], T], seconds: float) -> T:
    """Ask the store something, but wait no longer than ``seconds``: a stopped rank 0 never answers.

    Raises:
        ConnectionError: The store has ended.
        TimeoutError: The store has not answered in time.
        Exception: Whatever ``question`` raises.
    """
    time.sleep(_SECONDS_TO_CLOSE)  # the store of a rank 0 that is being ended may close after what has failed here
    check_runs(default_store())
    answers: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue()

    def ask() -> None:
        try:
            answers.put((question(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("The store does not answer.") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def check_runs(store: Any) -> None:
    """Check that a store still runs, as torch prints forty lines of C++ for a question to one that has ended.

    Raises:
        ConnectionError: It does not.
    """
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        try:
            socket.create_connection((store.host, store.port), timeout=_SECONDS_FOR_ALL).close()
        except OSError as error:
            raise ConnectionError("The store has ended.") from error


def is_consequence(error: BaseException) -> bool:
    """Whether ``record`` has found that another rank's error came before this one."""
    return any(text.startswith(_CONSEQUENCE) for text in getattr(error, "__notes__", ()))


def wait_for_all_ranks_in_handler() -> None:
    """If an exception is being handled, wait a few seconds until all ranks are handling one.

    Saving a checkpoint takes all ranks; without this, it would wait forever for ranks that have no exception.

    Raises:
        RuntimeError: Some ranks are not handling an exception.
    """
    if sys.exception() is None:
        return
    key, world = f"lightning_megatron/meeting_{next(_waits)}", dist.get_world_size()
    store = default_store()
    here = store.add(key, 1)
    deadline = time.monotonic() + _SECONDS_FOR_ALL
    while here < world and time.monotonic() < deadline:
        time.sleep(0.1)
        here = store.add(key, 0)
    if here < world:
        raise RuntimeError(
            f"No checkpoint was saved: {world - here} of {world} ranks did not raise the exception that is being"
            " handled, and a checkpoint needs every rank."
        )


def default_store() -> Any:
    """The store of the default group; torch (2.13) has no public way to it."""
    return dist.distributed_c10d._get_default_store()
