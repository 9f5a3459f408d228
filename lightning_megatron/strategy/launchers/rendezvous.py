"""Connects the started ranks of a run: they meet in a store, and make the process groups."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from lightning_megatron.distributed import first_error, process_group_backends, process_groups
from lightning_megatron.strategy.launchers.torchrun_restart import store_of_this_attempt


def meet(strategy: Any, backend: str | None, timeout: timedelta) -> None:
    """Meet the other ranks, and make the process groups of the layout.

    Args:
        strategy: The strategy; its cluster environment, device and layout are set.
        backend: The back end that the user asked for; None is the one for the device.
        timeout: How long ranks wait in a collective.
    """
    environment = strategy.cluster_environment
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    store = store_of_this_attempt(timeout)
    store = process_groups.rendezvous_store(strategy.global_rank, strategy.layout.world_size, timeout, store)
    process_group_backends.init_for_run(strategy.root_device, backend, environment, timeout, store)
    first_error.begin_run()
    process_groups.build(strategy.layout, timeout)
