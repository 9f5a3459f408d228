"""Compiles small functions of tensors when they are first called; where torch cannot, they run as they are.

Each function draws no random numbers and runs without autograd, so that forward, recomputed forward and evaluation run
the same kernel, and its arguments are as before if its compilation fails. torch keeps the kernels on disk, in the
folder ``TORCHINDUCTOR_CACHE_DIR``, and the next run finds them there.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch

_told: set[str] = set()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled for each type and width of its arguments, but not for each number of tokens.

    The first half of a tensor's dimensions may change from call to call: of ``[tokens, width]`` the tokens, of
    ``[s, b, head, channel]`` the first two, of a weight ``[width]`` none. A first dimension of 1 (one token) is not
    compiled for, since torch would compile for that size apart.
    """
    fast: Callable[..., Any] | None = None
    cannot = False

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        nonlocal fast, cannot
        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.dim() > 1]
        if cannot or tensors[0].size(0) == 1:
            return function(*args)
        try:
            from torch._dynamo import maybe_mark_dynamic  # the compiler, for which a run without it does not wait

            fast = fast or torch.compile(function, fullgraph=True, **_options())
            for tensor in tensors:
                maybe_mark_dynamic(tensor, list(range(tensor.dim() // 2)))
            return fast(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of torch's compiler, Triton or a C++ compiler: each raises its own
            cannot = True
            _tell(error)
            return function(*args)

    return call


def _options() -> dict[str, Any]:
    """What torch is told of the compilation, as far as this torch knows it (2.8 does not).

    Sums are taken in an order that no measurement decides, so that a resumed run is the same to the bit. A process may
    have many models, where torch would compile a function for eight types and widths.
    """
    from torch._inductor import config

    options: dict[str, Any] = {"options": {"deterministic": True}} if hasattr(config, "deterministic") else {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = 64
    return options


def _tell(error: Exception) -> None:
    """Warn, once in a process, that layers run unfused."""
    if _told:
        return
    _told.add(str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    warnings.warn(
        "Kernels(fused_layers=True): torch.compile cannot compile here, so the operations of a layer run one by one,"
        f" with the same results, but slower ({type(error).__name__}: {' '.join(lines[:2])})."
        " Install what it names (a C++ compiler on a CPU, Triton on a GPU), or give"
        " MegatronStrategy(kernels=Kernels(fused_layers=False)), which also ends this warning.",
        stacklevel=2,
    )
