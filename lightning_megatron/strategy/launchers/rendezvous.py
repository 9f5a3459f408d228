"""Connects the started ranks of a run: they meet in a store, and make the process groups."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from lightning_megatron.distributed import first_error, meeting, process_group_backends, process_groups
from lightning_megatron.strategy.launchers.timeouts import Timeouts
from lightning_megatron.strategy.launchers.torchrun_restart import store_of_this_attempt

_CONNECTING = timedelta(seconds=30)


def meet(strategy: Any, backend: str | None, timeouts: Timeouts) -> None:
    """Meet the other ranks, and make the process groups of the layout.

    Args:
        strategy: The strategy; its cluster environment, device and layout are set.
        backend: The back end that the user asked for; None is the one for the device.
        timeouts: How long ranks wait for one another.

    Raises:
        TimeoutError: A rank did not come in time; the message names it.
    """
    environment = strategy.cluster_environment
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    store = store_of_this_attempt(timeouts.start)
    store = meeting.meet(strategy.global_rank, strategy.layout.world_size, timeouts.start, store)
    # Sends and receives over Gloo keep this time (torch 2.13), so it is that of training. Connecting takes some, too.
    timeout = max(timeouts.collective, _CONNECTING)
    process_group_backends.init_for_run(strategy.root_device, backend, environment, timeout, store)
    first_error.begin_run()
    process_groups.build(strategy.layout, timeout)
    timeouts.begin_start()
