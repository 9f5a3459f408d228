"""Where the ranks of a run meet before they have process groups, and who is named when one of them does not come."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

_PORT, _ALL = "lightning_megatron/port", "all are here"
_SILENT = timedelta(seconds=10)  # a wait that takes longer is told
_PERIOD = 0.1  # seconds
_SHOWN = 8
_MORE_TIME = (
    "If they only start slowly, give them more time: MegatronStrategy(start_timeout=timedelta(minutes=60)), or in YAML"
    ' start_timeout: "1:00:00".'
)


@dataclass
class _State:
    """What the ranks agreed on when they first met; it outlives the process groups.

    Args:
        store: The store that the ranks meet at.
        count: How often the ranks have met.
    """

    store: dist.Store | None = None
    count: int = 0


_state = _State()


def meet(rank: int, world_size: int, timeout: timedelta, base: dist.Store | None = None) -> dist.Store | None:
    """Wait until all ranks are here; return a store for them, with a prefix that no earlier meeting has used.

    A store lives as long as any group that was made over it, even a group of an object that nobody uses any more.
    Ranks that meet again at the same port would reach that store, and read the addresses of destroyed groups; or one
    rank would come while another is about to shut it down. So the ranks agree on a port of their own at the first
    meeting, and keep that store.

    Args:
        rank: The number of this rank.
        world_size: How many ranks meet, at the ``MASTER_ADDR`` and ``MASTER_PORT`` of the environment.
        timeout: How long a rank waits for the others.
        base: A store that the ranks have already, such as torchrun's.

    Returns:
        None if the default group exists.

    Raises:
        TimeoutError: A rank did not come in time; the message names it.
    """
    if dist.is_initialized():
        return None
    if world_size == 1:
        return dist.HashStore()
    announcement = None
    if base is None:
        if _state.store is None:
            announcement, _state.store = _own_store(rank, world_size, timeout)
        base = _state.store
    store = dist.PrefixStore(f"lightning_megatron/meeting_{_state.count}", base)
    _state.count += 1
    _wait_for_all(store, rank, world_size, timeout)
    del announcement  # until here, rank 0 tells the port of the other store in it
    return store


def _own_store(rank: int, world_size: int, timeout: timedelta) -> tuple[dist.Store, dist.Store]:
    """A store at the port of the environment, in which rank 0 announces a free port, and the store at that port."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent keeps it
        agents: dist.Store = next(iter(dist.rendezvous("env://", rank, world_size, timeout=timeout)))[0]
        return agents, agents
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        announcement = dist.TCPStore(
            address, port, world_size, rank == 0, timeout, wait_for_workers=False, multi_tenant=True
        )
        if rank == 0:
            store = dist.TCPStore(address, 0, world_size, True, timeout, wait_for_workers=False)
            announcement.set(_PORT, str(store.port))
        else:
            store = dist.TCPStore(address, int(announcement.get(_PORT)), world_size, False, timeout)
    except dist.DistError as error:
        if rank == 0 or not any(words in str(error) for words in ("timed out", "timeout")):
            raise
        raise TimeoutError(
            f"MegatronStrategy: rank {rank} of {world_size} found no rank 0 at {address}:{port} within {timeout}. Look"
            " whether rank 0 runs, and whether this machine reaches that address (MASTER_ADDR, MASTER_PORT)."
            f" {_MORE_TIME}"
        ) from error
    return announcement, store


def _wait_for_all(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
    store.set(f"here/{rank}", "")
    if store.add("count", 1) == world_size:
        store.set(_ALL, "")
    if _wait(store, min(_SILENT, timeout)):
        return
    if rank == 0:
        rank_zero_info(
            f"MegatronStrategy: waiting for {_missing(store, world_size)} of {world_size} to start, for up to"
            f" {timeout} (start_timeout)."
        )
    if timeout <= _SILENT or not _wait(store, timeout - _SILENT):
        raise TimeoutError(
            f"MegatronStrategy: {_missing(store, world_size)} of {world_size} did not start within {timeout}. What they"
            f" printed says why, or their machine does. {_MORE_TIME}"
        )


def _wait(store: dist.Store, timeout: timedelta) -> bool:
    """Whether all ranks come in time; False, too, if rank 0 gives up first and takes the store with it."""
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        while not (here := store.check([_ALL])) and time.monotonic() < deadline:
            time.sleep(_PERIOD)  # store.wait prints two warnings when its time is over (torch 2.13)
    except dist.DistError:
        return False
    return here


def _missing(store: dist.Store, world_size: int) -> str:
    """The ranks that have not come yet, in words."""
    try:
        ranks = [rank for rank in range(world_size) if not store.check([f"here/{rank}"])]
    except dist.DistError:  # rank 0 has given up, and the store ended with it
        return "some ranks"
    named = [str(rank) for rank in ranks[:_SHOWN]]
    if more := len(ranks) - len(named):
        named.append(f"{more} more")
    listed = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"
