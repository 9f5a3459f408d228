"""Calls a function of tensors in the forward pass, and again in the backward pass: only what it was given is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def call_again_in_backward(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """``function(*tensors)``; all that it makes on the way, masks among it, is freed until the gradient comes.

    Unlike megatron-core's ``checkpoint`` it takes part in ``torch.autograd.grad``, and unlike torch's it saves its
    inputs as autograd does, so that what counts saved tensors counts them.

    Args:
        function: Its gradients are those of ``tensors`` alone; it draws the same random numbers again.
        *tensors: What it is called with.
    """
    found: torch.Tensor = _Again.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return found


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.function, ctx.device = function, tensors[0].device
        ctx.states = _states(ctx.device)
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad(), _random_state(ctx.states, ctx.device):
            result = ctx.function(*inputs)
        found = iter(torch.autograd.grad(result, [x for x in inputs if x.requires_grad], gradients[0]))
        return None, *(next(found) if need else None for need in needed)


def _states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def _random_state(states: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """For a while, random numbers are drawn from ``states``."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []):
        torch.set_rng_state(states[0])
        if on_cuda:
            torch.cuda.set_rng_state(states[1], device)
        yield
