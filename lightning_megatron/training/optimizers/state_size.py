"""How much an optimizer keeps of each weight, known before its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_megatron.training.optimizers.lean_adamw import LeanAdamW
from lightning_megatron.training.optimizers.muon import Muon


def states_of(optimizer: Any, device: str) -> float:
    """Numbers in fp32 that an optimizer keeps for each weight; in bf16, each counts a half.

    Of another optimizer than torch's Adam, AdamW and SGD and those here, what it keeps of its first weight so far. Of
    Muon, what it keeps of a matrix.

    Args:
        optimizer: The optimizer, or what makes it of parameters, which is a function or ``ParameterGroups``.
        device: Type of the weights' device, "cuda" or "cpu"; what is kept elsewhere does not count.
    """
    if not isinstance(optimizer, Optimizer):
        optimizer = optimizer.optimizer or AdamW if hasattr(optimizer, "build") else optimizer
        if getattr(optimizer, "func", optimizer) is Muon:  # it takes no other weights than those of a model
            return 1
        optimizer = optimizer([torch.nn.Parameter(torch.zeros(1, device="cpu"))])
    settings = optimizer.defaults
    if isinstance(optimizer, LeanAdamW):
        if settings["on_host"] and device != "cpu":
            return 0
        kinds = (settings["exp_avg_dtype"], settings["exp_avg_sq_dtype"])
        return sum(0.5 if kind == "bfloat16" else 1 for kind in kinds)
    if isinstance(optimizer, Adam | AdamW):
        return 3 if settings.get("amsgrad") else 2
    if isinstance(optimizer, SGD):
        return 1 if settings.get("momentum") else 0
    if isinstance(optimizer, Muon):
        return 1
    state: dict[str, Any] = next(iter(optimizer.state.values()), {})
    return sum(1 for value in state.values() if isinstance(value, torch.Tensor) and value.dim() > 0)
