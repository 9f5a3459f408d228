"""Explains the timeout of a collective: which ranks did not take part in it, and what they are doing instead.

Every few seconds each rank writes to the store where its main thread is; after a timeout, what it waited in.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_megatron.distributed import call_stacks, first_error
from lightning_megatron.distributed.layout import ParallelLayout

_HERE, _WAITED = "lightning_megatron/where/", "lightning_megatron/waited/"
_PERIOD = 2.0  # seconds
_SHOWN = 3
_TIMED_OUT = ("timed out", "timeout")
_CONNECTION_LOST = ("closed by peer", "reset by peer", "broken pipe", "connection refused")
# Where ranks wait for one another.
_WAITING_FILES = (
    "distributed/distributed_c10d.py",
    "distributed/c10d_logger.py",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/distributed/param_and_grad_buffer.py",
)

State = dict[str, Any]


class Heartbeat:
    """Writes the position of this rank's main thread to the store, from a background thread, until it is stopped."""

    def __init__(self) -> None:
        # None until it runs, as a strategy is pickled on its way to the ranks of a forkserver.
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start on every rank; does nothing if it is running."""
        if self._thread is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._stop = threading.Event()
            store = first_error.default_store().clone()  # a connection of its own
            self._thread = threading.Thread(target=self._tell, args=(self._stop, store, dist.get_rank()), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop, and write that this rank has left the run."""
        if self._stop is not None and self._thread is not None:
            self._stop.set()
            self._thread.join(2 * _PERIOD)
        self._stop = self._thread = None

    def _tell(self, stop: threading.Event, store: dist.Store, rank: int) -> None:
        main, beats = threading.main_thread().ident, 0
        who = {"run": first_error.run_number(), "process": os.getpid(), "host": platform.node()}
        try:
            while True:
                frame = sys._current_frames().get(main or 0)
                where = _where(traceback.extract_stack(frame))
                first_error.check_runs(store)
                store.set(f"{_HERE}{rank}", json.dumps({**who, "beats": beats, **where}))
                if stop.wait(_PERIOD):
                    break
                beats += 1
            first_error.check_runs(store)
            store.set(f"{_HERE}{rank}", json.dumps({**who, "left": True}))
        except Exception:  # the store ends with rank 0, and nobody reads it any more
            return


def explain_timeout(error: BaseException, layout: ParallelLayout) -> None:
    """Add a note to the timeout of a collective: which ranks it waited for, and where they are.

    Args:
        error: Any error; only timeouts and lost connections get a note.
        layout: The parallel sizes of the run.
    """
    text = str(error).lower()
    timed_out = any(words in text for words in _TIMED_OUT)
    lost = any(words in text for words in _CONNECTION_LOST) and "gloo" in text and not first_error.is_consequence(error)
    if not dist.is_initialized() or layout.world_size == 1 or not (timed_out or lost):
        return
    here = _where(call_stacks.of_error(error))
    rank, run = dist.get_rank(), first_error.run_number()
    waited = f"This rank waited in {here['collective'] or 'a collective'}, called by {here['place']}."
    try:
        first, second, last_words = first_error.ask_with_timeout(
            lambda: _ask(rank, here, layout.world_size, run), 5 * _PERIOD + 5
        )
    except Exception:
        if rank != 0:
            error.add_note(
                f"{waited} rank 0 does not answer: it has ended or is stopped, or its machine is unreachable. Where the"
                " other ranks are is not known, as rank 0 keeps the store that they write to."
            )
        return
    idle, waiting = [], {rank: here}
    for other in range(layout.world_size):
        if other == rank:
            continue
        before, now, last = first[other], second[other], last_words[other]
        if last is not None:
            waiting[other] = last  # it has timed out as well; what it does since then tells nothing
        elif problem := _problem(before, now, run):
            idle.append(f"{layout.rank_name(other)} {problem}")
        else:
            assert before is not None
            waiting[other] = before
    if idle:
        more = f"; and {len(idle) - _SHOWN} more" if len(idle) > _SHOWN else ""
        error.add_note(f"{waited} {'; '.join(idle[:_SHOWN])}{more}.")
    else:
        error.add_note(f"{waited} {_who_waits_where(waiting, rank)}")


def _ask(rank: int, here: State, world_size: int, run: int) -> tuple[list[State | None], ...]:
    """Read from the store where all ranks are, now and a little later, and what the ranks that timed out waited in.

    The second reading may be a copy of the first: a rank 0 that has timed out ends, and the store with it.
    """
    store = first_error.default_store()
    store.set(f"{_WAITED}{run}/{rank}", json.dumps(here))
    first = _read(store, _HERE, world_size)
    last_words = _read(store, f"{_WAITED}{run}/", world_size)
    try:
        time.sleep(2.5 * _PERIOD)
        first_error.check_runs(store)
        last_words = _read(store, f"{_WAITED}{run}/", world_size)
        return first, _read(store, _HERE, world_size), last_words
    except Exception:
        return first, [state and {**state, "beats": -1} for state in first], last_words


def _read(store: dist.Store, prefix: str, world_size: int) -> list[State | None]:
    keys = [f"{prefix}{rank}" for rank in range(world_size)]
    return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]


def _problem(before: State | None, now: State | None, run: int) -> str | None:
    """Why a rank does not take part in the collective that others wait in; None if it waits itself."""
    if before is None or now is None or now["run"] != run or now.get("left"):
        return "is not in this run: it has left trainer.fit (or validate, ...), or has not called it"
    if before == now:
        return f"no longer reports: {_what_became_of(now)}"
    if not before["collective"]:
        return f"is in no collective; it is in {before['stack']}"
    return None


def _what_became_of(rank: State) -> str:
    """What happened to a rank without a heartbeat; on this machine, the system knows."""
    process, status = rank["process"], Path(f"/proc/{rank['process']}/stat")
    if rank["host"] != platform.node() or not Path("/proc/self/stat").exists():
        return "it has ended or is stopped, or its machine is unreachable"
    state = status.read_text().rpartition(")")[2].split()[0] if status.exists() else "Z"
    if state in "ZX":
        return f"its process {process} has ended without an error; `dmesg` says whether it ran out of memory"
    if state in "Tt":
        return f"its process {process} is stopped (SIGSTOP, or a debugger); `kill -CONT {process}` continues it"
    return f"its process {process} is alive, but runs no Python: a call into C holds the interpreter"


def _who_waits_where(waiting: dict[int, State], rank: int) -> str:
    ranks_at: dict[tuple[str, str], list[int]] = {}
    for other in sorted(waiting):
        ranks_at.setdefault((waiting[other]["collective"], waiting[other]["place"]), []).append(other)
    if len(ranks_at) == 1:
        return (
            "All ranks wait there: one of them may be a call ahead of the others, because of a condition that differs"
            " between ranks, or a connection is lost."
        )
    lines = [f"ranks {ranks} in {what}, called by {place}" for (what, place), ranks in ranks_at.items()]
    return (
        f"All ranks are alive and wait for each other: {'; '.join(lines)}. Every rank has to make the same calls in the"
        " same order. Look for a call under `if rank == 0`, or a condition that differs between ranks, such as the"
        " number of batches."
    )


def _where(stack: Iterable[traceback.FrameSummary]) -> State:
    """The innermost calls of a stack, the collective among them, and the place that called it."""
    calls = list(stack)
    shown = " < ".join(call_stacks.shown(call) for call in reversed(calls[-_SHOWN:]))
    first = next((number for number, call in enumerate(calls) if call.filename.endswith(_WAITING_FILES)), len(calls))
    names = [call.name for call in calls[first:] if call.filename.endswith(_WAITING_FILES) and call.name != "wrapper"]
    caller = call_stacks.users(calls[:first])
    place = call_stacks.shown(caller) if caller else "an unknown place"
    return {"stack": shown, "collective": names[0] if names else "", "place": place}
