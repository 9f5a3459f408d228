"""Runs a function on several ranks, as real processes over Gloo, started from a preloaded forkserver.

``run_ranks`` starts processes for one call. ``run_in_pool`` keeps them for the next call of its size in the same test
module: for trainings that do not care what the process did before, which several Trainers in one process may not.
"""

import contextlib
import faulthandler
import gc
import io
import multiprocessing
import os
import secrets
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
PRELOADED = ["lightning_megatron.callbacks", "lightning_megatron.data", "transformers", "tests.reference.plain_gpt"]
_context.set_forkserver_preload(PRELOADED)


class RankError(AssertionError):
    """The traceback of a rank that failed."""


def run_ranks(
    world_size: int, function: Any, *args: Any, timeout: float = 120, seconds_for_others: float = 120
) -> list[Any]:
    """Call the module-level ``function(*args)`` on each rank under a torchrun-like environment; all their results.

    Ranks are waited for in turn, ``timeout`` seconds each, and all but the first no longer than ``seconds_for_others``.
    """
    results = _launch(world_size, function, args, timeout, seconds_for_others)
    if any("EADDRINUSE" in result.get("error", "") for result in results):  # somebody took the port meanwhile
        results = _launch(world_size, function, args, timeout, seconds_for_others)
    return _values(results)


def run_in_pool(world_size: int, function: Any, *args: Any, timeout: float = 120) -> list[Any]:
    """``run_ranks`` on processes that stay, until ``close_pools``, or one of them fails or exceeds the time."""
    pool = _pools.get(world_size) or _pools.setdefault(world_size, _Pool(world_size))
    results = pool.call(function, args, timeout)
    if any("error" in result for result in results):
        _pools.pop(world_size).close()
    return _values(results)


def close_pools() -> None:
    while _pools:
        _pools.popitem()[1].close()


def process(rank: int, world_size: int, port: int, folder: str, function: Any, args: Any) -> Any:
    """One rank, not yet started; it leaves its result in ``folder``."""
    return _context.Process(target=_rank, args=(rank, world_size, port, folder, sys.executable, function, args))


def free_port() -> int:
    """A port below those that the system gives to whoever asks for any: nobody takes it until the test's ranks do."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


class _Pool:
    """The ranks of one world, waiting for calls."""

    def __init__(self, world_size: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        pairs = [_context.Pipe() for _ in range(world_size)]
        self.connections, port = [ours for ours, _ in pairs], free_port()
        self.processes = [
            process(rank, world_size, port, self.folder.name, _answer, (theirs,))
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for started in self.processes:
            started.start()
        for _, theirs in pairs:
            theirs.close()

    def call(self, function: Any, args: Any, timeout: float) -> list[dict[str, Any]]:
        for connection in self.connections:
            connection.send((function, args))
        return [self._result(rank, connection, timeout) for rank, connection in enumerate(self.connections)]

    def _result(self, rank: int, connection: Any, timeout: float) -> dict[str, Any]:
        try:
            if connection.poll(timeout):
                return torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)
        except EOFError:
            self.processes[rank].join(timeout)
        return _result(Path(self.folder.name) / str(rank), self.processes[rank])

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


_pools: dict[int, _Pool] = {}


def _answer(connection: Any) -> None:
    """What a rank of a pool does.

    Trainers are let go by the garbage collector, and with them process groups, each with three threads: it runs before
    each call, when all ranks have ended the last one, and passes over what was imported.
    """
    gc.freeze()
    while True:
        function, args = connection.recv()
        gc.collect()
        result = io.BytesIO()
        torch.save(_called(function, args), result)
        connection.send_bytes(result.getvalue())


def _launch(
    world_size: int, function: Any, args: Any, timeout: float, seconds_for_others: float
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [process(rank, world_size, port, folder, function, args) for rank in range(world_size)]
        for started in processes:
            started.start()
        try:
            for started in processes:
                started.join(timeout)
                timeout = min(timeout, seconds_for_others)
            return [_result(Path(folder) / str(rank), ended) for rank, ended in enumerate(processes)]
        finally:
            for left in processes:
                left.kill()
                left.join()


def _rank(rank: int, world_size: int, port: int, folder: str, python: str, function: Any, args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
    )
    torch.set_num_threads(1)
    sys.executable = python
    crash = (Path(folder) / f"{rank}.crash").open("w")
    faulthandler.enable(crash)  # a crash in C++ says where
    torch.save(_called(function, args), Path(folder) / str(rank))
    os._exit(0)


def _called(function: Any, args: Any) -> dict[str, Any]:
    try:
        return {"value": function(*args)}
    except BaseException as error:
        return {"error": f"rank {os.environ['RANK']}: " + "".join(traceback.format_exception(error))}


def _result(path: Path, process: Any) -> dict[str, Any]:
    if path.exists():
        return torch.load(path, weights_only=False)
    crash = path.with_suffix(".crash")
    where = crash.read_text() if crash.exists() else ""
    return {"error": f"rank {path.name} gave no result (exit code {process.exitcode}; None: it still ran)\n{where}"}


def _values(results: list[dict[str, Any]]) -> list[Any]:
    errors = [result["error"] for result in results if "error" in result]
    if errors:
        raise RankError("\n".join(errors))
    return [result["value"] for result in results]
