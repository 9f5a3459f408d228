"""Which back end of torch.distributed carries the tensors of a device: groups of another make way, or are refused."""

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
    # It has no version of the coalesced all-gather for CUDA, and reads the GPU's addresses as the host's (torch 2.13).
    ("cuda", "gloo"): "over Gloo megatron-core's all-gather of CUDA tensors ends in a segmentation fault",
}

_made: Any = None  # a weak reference to the default group that a run of this process has made


def choose(device: str, wanted: str | None) -> str:
    """The back end for a run.

    Args:
        device: "cpu" or "cuda", where the model is.
        wanted: What the user asks for; None takes what fits.

    Raises:
        MisconfigurationException: ``wanted`` cannot carry the device's tensors.
    """
    if wanted is not None and (device, wanted) in _CANNOT:
        raise MisconfigurationException(
            f"MegatronStrategy(process_group_backend={wanted!r}) with a model on {device!r}: {_CANNOT[device, wanted]}."
            f" Leave it out, which takes {_OF_DEVICE[device]!r}, or choose another Trainer(accelerator=)."
        )
    return wanted or _OF_DEVICE.get(device, "gloo")


def supports(configuration: str, device: str) -> bool:
    """Whether a group can carry a device's tensors.

    Args:
        configuration: The group's, as ``torch.distributed.get_backend_config`` has it: "cpu:gloo,cuda:nccl".
        device: "cpu" or "cuda".
    """
    each = dict(pair.split(":") for pair in configuration.lower().split(","))
    return device in each and (device, each[device]) not in _CANNOT


def destroy_unsuitable(device: torch.device) -> None:
    """End an earlier run's groups where they cannot carry what is on ``device``; all ranks call this.

    Raises:
        MisconfigurationException: They are somebody else's.
    """
    if not dist.is_initialized() or supports(configuration := dist.get_backend_config(), device.type):
        return
    if _made is None or dist.group.WORLD is not _made():
        raise MisconfigurationException(
            f"The process group that stands already has the back ends {configuration!r}, and a model on"
            f" {device.type!r} needs {_OF_DEVICE[device.type]!r}. Something else in this program has made it: call"
            " torch.distributed.destroy_process_group() before this run, or make it with"
            " init_process_group('cpu:gloo,cuda:nccl'), which carries both."
        )
    process_groups.destroy()


def init_for_build(device: torch.device) -> None:
    """Meet the ranks that there are, for a model without a run; groups of an earlier one make way.

    Raises:
        MisconfigurationException: Somebody else's groups stand, which cannot carry what is on ``device``.
    """
    destroy_unsuitable(device)
    if not dist.is_initialized():
        process_groups.init_default_group(device)
        _remember()


def init_for_run(
    device: torch.device, wanted: str | None, environment: ClusterEnvironment, timeout: timedelta, store: Any = None
) -> None:
    """Meet the other ranks of a run, where that has not been done.

    Args:
        device: Of the model.
        wanted: The back end that the user asks for.
        environment: Knows the ranks and the first one's address.
        timeout: Of collectives.
        store: Through which they meet; None leaves that to torch.
    """
    if dist.is_initialized():
        return
    name = choose(device.type, wanted)
    bound = device if name == "nccl" else None  # Gloo cannot be bound to one
    lightning_private.start_process_group(environment, name, timeout=timeout, device_id=bound, store=store)
    _remember()


def _remember() -> None:
    """Take the default group that stands for this process's own."""
    global _made
    _made = weakref.ref(dist.group.WORLD)
