"""Who a rank has waited for when a collective times out: each rank tells the store, now and then, where it is."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any

import torch.distributed as dist

from lightning_megatron.layout import ParallelLayout

_KEY = "lightning_megatron/where/"
_PERIOD = 2.0  # seconds
_SHOWN = 3


class Heartbeat:
    """Tells where this rank's main thread is, from a thread of its own, until it is stopped."""

    def __init__(self) -> None:
        # None until it runs: a strategy is pickled on its way to a forkserver's ranks.
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; nothing happens where it has begun."""
        if self._thread is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._stop = threading.Event()
            store: Any = dist.distributed_c10d._get_default_store()  # private; a copy is a connection of its own
            self._thread = threading.Thread(
                target=self._tell, args=(self._stop, store.clone(), dist.get_rank()), daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End."""
        if self._stop is not None and self._thread is not None:
            self._stop.set()
            self._thread.join(2 * _PERIOD)
        self._stop = self._thread = None

    def _tell(self, stop: threading.Event, store: dist.Store, rank: int) -> None:
        main, beats = threading.main_thread().ident, 0
        while not stop.wait(_PERIOD):
            beats += 1
            frame = sys._current_frames().get(main or 0)
            try:
                store.set(f"{_KEY}{rank}", json.dumps({"beats": beats, **_where(frame)}))
            except Exception:  # the store is gone with rank 0, and with it whoever would ask
                return


def explain(error: BaseException, layout: ParallelLayout) -> None:
    """To the error of a collective that timed out, add which ranks it waited for, and where they are.

    Args:
        error: Any error; others are left as they are.
        layout: Of the run.
    """
    text = str(error).lower()
    if not dist.is_initialized() or ("timed out" not in text and "timeout" not in text):
        return
    try:
        before = _read(layout.world_size)
        time.sleep(2.5 * _PERIOD)
        now = _read(layout.world_size)
    except Exception:  # rank 0 is gone
        return
    lines = []
    for rank, known in now.items():
        place = layout.coordinates(rank)
        name = f"rank {rank} (pipeline stage {place.pp}, tensor rank {place.tp}, replica {place.dp})"
        if known is None or known == before[rank]:
            lines.append(f"{name} is not heard of any more: it is dead, stopped, or its machine is gone")
        elif not known["collective"] and rank != dist.get_rank():
            lines.append(f"{name} is in no collective; it is in {known['stack']}")
    last = _last_collective(error) or "a collective"
    if lines:
        shown = "; ".join(lines[:_SHOWN]) + (f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")
        error.add_note(f"This rank waited in {last}. {shown}.")


def _read(world_size: int) -> dict[int, dict[str, Any] | None]:
    store = dist.distributed_c10d._get_default_store()
    keys = {rank: f"{_KEY}{rank}" for rank in range(world_size)}
    return {rank: json.loads(store.get(key)) if store.check([key]) else None for rank, key in keys.items()}


def _where(frame: FrameType | None) -> dict[str, Any]:
    """The innermost calls, and the collective that is among them."""
    stack = traceback.extract_stack(frame)
    names = [f"{call.name} ({call.filename.rsplit('site-packages/')[-1]}:{call.lineno})" for call in stack[-_SHOWN:]]
    collective = next((call.name for call in reversed(stack) if _is_collective(call.filename)), "")
    return {"stack": " < ".join(reversed(names)), "collective": collective}


def _last_collective(error: BaseException) -> str:
    calls = traceback.extract_tb(error.__traceback__)
    return next((call.name for call in reversed(calls) if _is_collective(call.filename)), "")


def _is_collective(file: str) -> bool:
    return file.endswith(("distributed/distributed_c10d.py", "distributed/c10d_logger.py"))
