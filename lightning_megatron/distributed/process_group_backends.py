"""Chooses the back end of torch.distributed for a device; destroys or refuses existing groups of another one."""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_megatron.distributed import lightning_private, process_groups

_OF_DEVICE = {"cpu": "gloo", "cuda": "nccl"}
_CANNOT = {
    ("cpu", "nccl"): "NCCL carries tensors between GPUs only",
    # Gloo has no coalesced all-gather for CUDA, and reads addresses of the GPU as those of the host (torch 2.13).
    ("cuda", "gloo"): "over Gloo megatron-core's all-gather of CUDA tensors ends in a segmentation fault",
}

_made: Any = None  # a weak reference to the default group that this package has created in this process


def choose(device: str, wanted: str | None) -> str:
    """Choose the back end for a run.

    Args:
        device: The device type of the model, "cpu" or "cuda".
        wanted: The back end that the user asks for; None takes the device's usual one.

    Raises:
        MisconfigurationException: ``wanted`` cannot transfer tensors of the device.
    """
    if wanted is not None and (device, wanted) in _CANNOT:
        raise MisconfigurationException(
            f"MegatronStrategy(process_group_backend={wanted!r}) with a model on {device!r}: {_CANNOT[device, wanted]}."
            f" Leave process_group_backend out, which takes {_OF_DEVICE[device]!r}, or choose another"
            " Trainer(accelerator=)."
        )
    return wanted or _OF_DEVICE.get(device, "gloo")


def supports(configuration: str, device: str) -> bool:
    """Whether a group can transfer tensors of a device.

    Args:
        configuration: What ``torch.distributed.get_backend_config`` returns for the group: "cpu:gloo,cuda:nccl".
        device: The device type, "cpu" or "cuda".
    """
    each = dict(pair.split(":") for pair in configuration.lower().split(","))
    return device in each and (device, each[device]) not in _CANNOT


def destroy_unsuitable(device: torch.device) -> None:
    """Destroy an earlier run's groups if they cannot transfer tensors of ``device``; all ranks call this.

    Raises:
        MisconfigurationException: This package has not created the groups.
    """
    if not dist.is_initialized() or supports(configuration := dist.get_backend_config(), device.type):
        return
    if not _is_own():
        raise MisconfigurationException(
            f"The existing process group has the back ends {configuration!r}, and a model on {device.type!r} needs"
            f" {_OF_DEVICE[device.type]!r}. Something else in this program has created the group: call"
            " torch.distributed.destroy_process_group() before this run, or create it with"
            " init_process_group('cpu:gloo,cuda:nccl'), which serves both devices."
        )
    process_groups.destroy()


def init_for_build(device: torch.device) -> None:
    """Initialise the default group to build a model outside of a run; unsuitable groups of a run are destroyed.

    Raises:
        MisconfigurationException: Groups exist that this package has not created and that do not support ``device``.
    """
    destroy_unsuitable(device)
    if not dist.is_initialized():
        process_groups.init_default_group(device)
        _remember()


def init_for_run(
    device: torch.device, wanted: str | None, environment: ClusterEnvironment, timeout: timedelta, store: Any = None
) -> None:
    """Initialise the default group of a run, if it does not exist.

    Args:
        device: The device of the model.
        wanted: The back end that the user asks for.
        environment: The cluster environment, which has the ranks and the address of rank 0.
        timeout: How long a collective may take.
        store: The store at which the ranks meet; None leaves the choice to torch.
    """
    if dist.is_initialized():
        return
    name = choose(device.type, wanted)
    bound = device if name == "nccl" else None  # Gloo cannot be bound to a device
    lightning_private.start_process_group(environment, name, timeout=timeout, device_id=bound, store=store)
    _remember()


def set_timeout(timeout: timedelta) -> None:
    """Change how long a collective may take, in all groups of a run; a default group of somebody else keeps its own."""
    process_groups.set_timeout(timeout)
    world = dist.group.WORLD
    if world is not None and _is_own():
        world.set_timeout(timeout)


def _is_own() -> bool:
    """Whether this package has created the default group."""
    return _made is not None and dist.group.WORLD is _made()


def _remember() -> None:
    """Note that this package has created the default group."""
    global _made
    _made = weakref.ref(dist.group.WORLD)
