"""Keeps the ranks that torchrun has restarted from finding the addresses of dead ranks in its store."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


def store_of_this_attempt(timeout: timedelta) -> dist.Store | None:
    """A part of torchrun's store to which no earlier attempt has written; None where torchrun restarts nothing.

    torchrun 2.13 hands one store to all attempts, and new ranks then connect to dead ones
    (https://github.com/pytorch/pytorch/issues/135712). Attempts are numbered on each node, so the number
    tells them apart only where there is one node.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or restarts == 0 or dist.is_initialized():
        return None
    if os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        rank_zero_warn(
            "torchrun --max-restarts on several nodes: restarted ranks may connect to dead ones (pytorch issue 135712)."
            " Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun."
        )
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, int(os.environ["WORLD_SIZE"]), is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
