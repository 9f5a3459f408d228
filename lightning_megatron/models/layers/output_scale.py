"""Multiplies a module's output, or its input, by a constant."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def scale_output(module: torch.nn.Module, factor: float) -> None:
    """Multiply what ``module`` returns by ``factor``, rounded to the type of the output first, as transformers does.

    Of several tensors, such as the output of a linear layer and its bias, each is multiplied.
    """
    module.register_forward_hook(partial(_scale_output, factor))


def scale_input(module: torch.nn.Module, factor: float) -> None:
    """Multiply the first argument of ``module`` by ``factor``."""
    module.register_forward_pre_hook(partial(_scale_input, factor))


def _scale_output(factor: float, _: torch.nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(None if each is None else _scaled(factor, each) for each in output)
    return _scaled(factor, output)


def _scale_input(factor: float, _: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return _scaled(factor, inputs[0]), *inputs[1:]


def _scaled(factor: float, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * tensor.new_full((), factor)
