"""When one rank raises, its peers fail on broken connections: tell them, and the user, what came first."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

import torch.distributed as dist

_KEY = "lightning_megatron/first_error_of_run"
_CONSEQUENCE = "This is a consequence. First, "
_SECONDS_FOR_ALL = 15
_meetings = count()
T = TypeVar("T")
_run = 0


def begin_run() -> None:
    """A new run, in which the errors of earlier ones are not the first; called by all ranks."""
    global _run
    _run += 1


def run_number() -> int:
    """The number of the run, the same on all ranks."""
    return _run


def record(error: BaseException) -> None:
    """Record ``error`` as the run's first, or add to it a note of the one that was first on another rank."""
    if not dist.is_initialized():
        return
    what = f"{type(error).__name__}: {error}"
    mine = f"rank {dist.get_rank()} raised {what}"
    try:
        first = ask_with_timeout(lambda: _store().compare_set(f"{_KEY}_{_run}", "", mine), _SECONDS_FOR_ALL).decode()
    except Exception:  # the store dies with rank 0: then there is nobody to ask, and nothing to add
        return
    if not first.endswith(f" raised {what}"):  # the same error on every rank follows from nothing
        error.add_note(_CONSEQUENCE + first)


def ask_with_timeout(question: Callable[[], T], seconds: float) -> T:
    """The answer to a question to the store, which may never come where rank 0 is stopped.

    Raises:
        TimeoutError: None has come in time.
        Exception: Of the question.
    """
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


def is_consequence(error: BaseException) -> bool:
    """Whether ``record`` has found that another rank's error came before this one."""
    return any(text.startswith(_CONSEQUENCE) for text in getattr(error, "__notes__", ()))


def wait_for_all_ranks_in_handler() -> None:
    """While an exception is handled, wait a little for all ranks to come here too, and give up if they do not.

    What all ranks do together (saving a checkpoint) would otherwise wait for ranks that know of no exception.

    Raises:
        RuntimeError: Some ranks did not come.
    """
    if sys.exception() is None:
        return
    key, world = f"lightning_megatron/meeting_{next(_meetings)}", dist.get_world_size()
    store = _store()
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


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()  # private (torch 2.13), the only way to the store
