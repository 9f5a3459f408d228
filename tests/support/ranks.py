"""Runs a function on several ranks, as real processes over Gloo, started from a preloaded forkserver."""

import faulthandler
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
PRELOADED = ["lightning_megatron", "transformers", "tests.reference.plain_gpt"]
_context.set_forkserver_preload(PRELOADED)


class RankError(AssertionError):
    """The traceback of a rank that failed."""


def run_ranks(world_size: int, function: Any, *args: Any, timeout: float = 120) -> list[Any]:
    """Call the module-level ``function(*args)`` on each rank under a torchrun-like environment; all their results."""
    results = _launch(world_size, function, args, timeout)
    if any("EADDRINUSE" in result.get("error", "") for result in results):  # somebody took the port meanwhile
        results = _launch(world_size, function, args, timeout)
    errors = [result["error"] for result in results if "error" in result]
    if errors:
        raise RankError("\n".join(errors))
    return [result["value"] for result in results]


def _launch(world_size: int, function: Any, args: Any, timeout: float) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [process(rank, world_size, port, folder, function, args) for rank in range(world_size)]
        for started in processes:
            started.start()
        try:
            for started in processes:
                started.join(timeout)
            return [_result(Path(folder) / str(rank), ended) for rank, ended in enumerate(processes)]
        finally:
            for left in processes:
                left.kill()
                left.join()


def process(rank: int, world_size: int, port: int, folder: str, function: Any, args: Any) -> Any:
    """One rank, not yet started; it leaves its result in ``folder``."""
    return _context.Process(target=_rank, args=(rank, world_size, port, folder, sys.executable, function, args))


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
    try:
        result = {"value": function(*args)}
    except BaseException as error:
        result = {"error": f"rank {rank}: " + "".join(traceback.format_exception(error))}
    torch.save(result, Path(folder) / str(rank))
    os._exit(0)


def _result(path: Path, process: Any) -> dict[str, Any]:
    if path.exists():
        return torch.load(path, weights_only=False)
    crash = path.with_suffix(".crash")
    where = crash.read_text() if crash.exists() else ""
    return {"error": f"rank {path.name} gave no result (exit code {process.exitcode}; None: it still ran)\n{where}"}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
