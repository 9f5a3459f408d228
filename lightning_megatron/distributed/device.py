"""What differs between a machine with CUDA and one without: chosen once per run by the device, CUDA being the default.

On CUDA nothing here touches megatron-core. :mod:`lightning_megatron.distributed.cpu_patches` is imported only for a run
on the CPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["model_rng", "use_device"]

_on_cpu = False


def use_device(device: torch.device) -> None:
    """Fit megatron-core to ``device``: bend it for the CPU, or undo that for anything else."""
    global _on_cpu
    wanted = device.type == "cpu"
    if wanted == _on_cpu:
        return
    from lightning_megatron.distributed import cpu_patches

    (cpu_patches.bend if wanted else cpu_patches.unbend)()
    _on_cpu = wanted


def model_rng() -> AbstractContextManager[None]:
    """The context in which a model is built or run, so that its random numbers are the device's and not the data's.

    A GPU has a generator of its own. On the CPU the model and the data share one, and pipeline stages, which draw
    differently, would shuffle the data differently; so the model's state is kept apart there.
    """
    if not _on_cpu:
        return nullcontext()
    from lightning_megatron.distributed import cpu_patches

    return cpu_patches.model_rng()
