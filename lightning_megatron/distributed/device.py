"""Prepares megatron-core for the device of a run, and gives the model its own random state on the CPU.

CUDA is the default, for which nothing in megatron-core is changed but faults that :mod:`megatron_versions` mends.
:mod:`lightning_megatron.distributed.cpu_patches` is imported only for a run on the CPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["model_rng", "use_device"]

_on_cpu = False


def use_device(device: torch.device) -> None:
    """Patch megatron-core for the CPU, or undo the patches for any other device."""
    global _on_cpu
    from lightning_megatron.distributed import megatron_versions

    megatron_versions.sum_views_too()
    megatron_versions.take_gathered_logits()
    wanted = device.type == "cpu"
    if wanted == _on_cpu:
        return
    from lightning_megatron.distributed import cpu_patches

    (cpu_patches.bend if wanted else cpu_patches.unbend)()
    _on_cpu = wanted


def model_rng() -> AbstractContextManager[None]:
    """The context in which a model is built or run, so that it does not draw from the data's random state.

    A GPU has a generator of its own. On the CPU, model and data share one. Pipeline stages draw different amounts of
    random numbers and would shuffle the data differently, so the model has a random state of its own there.
    """
    if not _on_cpu:
        return nullcontext()
    from lightning_megatron.distributed import cpu_patches

    return cpu_patches.model_rng()
