"""Multiplies a module's output by a constant."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def scale_output(module: torch.nn.Module, factor: float) -> None:
    """Multiply what ``module`` returns by ``factor``, rounded to the type of the output first, as transformers does."""
    module.register_forward_hook(partial(_scale, factor))


def _scale(factor: float, _: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output * output.new_full((), factor)
