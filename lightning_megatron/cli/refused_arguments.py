"""Raises what a class has refused of its arguments, where jsonargparse goes on to make a function in its place."""

from __future__ import annotations

import functools
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_megatron.training.lr_schedule import LRSchedule
from lightning_megatron.training.parameter_groups import ParameterGroups

# Arguments of modules that are a class or a function: the class, and the base of what the function makes.
_EITHER: dict[str, tuple[type, type]] = {
    "lr_schedule": (LRSchedule, LRScheduler),
    "optimizer": (ParameterGroups, Optimizer),
}


def raise_refusals(module: Any) -> None:
    """Raise the error of a class whose arguments jsonargparse has given to the base of what the function would make.

    Args:
        module: The module of a run, as it was made.

    Raises:
        ValueError: The arguments are wrong.
    """
    for name, (cls, base) in _EITHER.items():
        given = getattr(module, name, None)
        if isinstance(given, functools.partial) and base in given.args:
            cls(**given.keywords)
