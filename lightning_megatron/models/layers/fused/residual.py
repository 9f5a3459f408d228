"""Bias, dropout, residual sum and the norm behind it in one kernel, and their gradients in another.

What leaves a sum goes two ways: into the norm, and past the next block as its residual. A function that returns both
gets both gradients, and adds them in the kernel of the norm's backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_megatron.models.layers.fused.compiled import compiled
from lightning_megatron.models.layers.norm import TorchNorm, ZeroCentredLayerNorm, ZeroCentredRMSNorm

Pair = tuple[torch.Tensor, torch.Tensor]


def fused_bias_dropout_add(training: bool, _: bool) -> Callable[..., torch.Tensor]:
    """megatron-core's ``get_bias_dropout_add``: the function of (output and bias, residual, probability)."""

    def add(output_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, p: float) -> Any:
        x, bias = output_and_bias
        kept, scale = _kept(x, p, training)
        return _Add.apply(x, bias, residual.to(x.dtype), kept, scale)  # type: ignore[no-untyped-call]

    return add


class AddingNorm(torch.nn.Module):
    """A norm that also returns what it normalises, and first adds a block's output to that."""

    normalized_shape: tuple[int, ...]
    weight: Any
    eps: Any
    centred = True  # a LayerNorm subtracts the mean

    def forward(self, x: torch.Tensor, added: Any = None, p: float | None = None) -> Any:
        """Normalise over the last dimension, as torch's norm does; or do more than that.

        Args:
            x: ``[s, b, h]``.
            added: A block's output ``[s, b, h]`` and its bias ``[h]`` or None, to be added to ``x``.
            p: The probability of their dropout. None: there is nothing to add, and only the norm is returned.

        Returns:
            The norm of ``x``; with a ``p``, the sum ``x + dropout(output + bias)``, and its norm.
        """
        if p is None:
            return super().forward(x)
        output, bias = (None, None) if added is None else added
        kept, scale = (None, 1.0) if output is None else _kept(output, p, self.training)
        x = x if output is None else x.to(output.dtype)  # as megatron-core does, where the residual is kept in fp32
        shift = getattr(self, "bias", None)
        return _AddAndNorm.apply(  # type: ignore[no-untyped-call]
            x, output, bias, kept, scale, self.factor, shift, self.eps, self.centred
        )

    @property
    def factor(self) -> torch.Tensor:
        """What the normalised values are multiplied by."""
        return self.weight


class _LayerNorm(AddingNorm, torch.nn.LayerNorm):
    pass


class _RMSNorm(AddingNorm, torch.nn.RMSNorm):
    centred = False


class _FromOne(AddingNorm):
    """A norm whose weight is counted from one."""

    @property
    def factor(self) -> torch.Tensor:
        return 1 + self.weight


class _ZeroCentredLayerNorm(_FromOne, ZeroCentredLayerNorm):
    pass


class _ZeroCentredRMSNorm(_FromOne, ZeroCentredRMSNorm):
    centred = False


class FusedNorm(TorchNorm):
    """``TorchNorm``, whose norms are ``AddingNorm``s."""

    norms = {
        ("LayerNorm", False): _LayerNorm,
        ("LayerNorm", True): _ZeroCentredLayerNorm,
        ("RMSNorm", False): _RMSNorm,
        ("RMSNorm", True): _ZeroCentredRMSNorm,
    }


def _kept(x: torch.Tensor, p: float, training: bool) -> tuple[torch.Tensor | None, float]:
    """Which values dropout keeps ``[s, b, h]``, and their factor.

    Drawn by torch's generator and not in the compiled function, so that dropout continues from a saved random state.
    On a CPU they are the ones that ``torch.nn.functional.dropout`` draws.
    """
    if not training or p == 0.0:
        return None, 1.0
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p), 1 / (1 - p)


class _Add(torch.autograd.Function):
    """``residual + dropout(x + bias)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        kept: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return _add(*map(_rows, (x, residual, kept)), bias, scale).view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (kept,), (of_sum,) = ctx.saved_tensors, gradients
        if kept is None and not ctx.needs_input_grad[1]:
            return of_sum, None, of_sum, None, None
        of_x, of_bias = _add_backward(_rows(of_sum), _rows(kept), ctx.scale, ctx.needs_input_grad[1])
        return of_x.view_as(of_sum), of_bias, of_sum, None, None


class _AddAndNorm(torch.autograd.Function):
    """The sum ``residual + dropout(x + bias)``, or the residual itself, and its norm."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        x: torch.Tensor | None,
        bias: torch.Tensor | None,
        kept: torch.Tensor | None,
        scale: float,
        weight: torch.Tensor,
        shift: torch.Tensor | None,
        eps: float | None,
        centred: bool,
    ) -> Pair:
        ctx.set_materialize_grads(False)
        eps = torch.finfo(residual.dtype).eps if eps is None else eps
        added = residual if x is None else x
        flat, normal, mean, scaling = _add_and_norm(
            *map(_rows, (residual, x, kept)), bias, scale, weight, shift, eps, centred
        )
        total = flat if x is not None else _rows(residual)
        ctx.save_for_backward(total, mean, scaling, weight, shift, kept)
        ctx.scale = scale
        return (residual.view_as(residual) if x is None else flat.view_as(added)), normal.view_as(added)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        total, mean, scaling, weight, shift, kept = ctx.saved_tensors
        of_sum, of_normal = gradients
        wanted = ctx.needs_input_grad
        if of_normal is None:
            of_normal = torch.zeros_like(total)
        of_total, of_x, of_bias, of_weight, of_shift = _norm_backward(
            _rows(of_normal), _rows(of_sum), total, mean, scaling, _rows(kept), weight, shift, ctx.scale,
            wanted[2], wanted[5], wanted[6],
        )  # fmt: skip
        of_total = of_total.view(of_normal.shape)
        if wanted[1] and of_x is None:
            of_x = of_total
        of_x = None if of_x is None else of_x.view(of_normal.shape)
        return of_total, of_x if wanted[1] else None, of_bias, None, None, of_weight, of_shift, None, None


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """``[tokens, h]`` of ``[s, b, h]``."""
    return None if x is None else x.reshape(-1, x.size(-1))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@compiled
def _add(
    x: torch.Tensor, residual: torch.Tensor, kept: torch.Tensor | None, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return _sum(residual, x, kept, bias, scale).to(x.dtype)


@compiled
def _add_backward(of_sum: torch.Tensor, kept: torch.Tensor | None, scale: float, of_bias: bool) -> Any:
    of_x = of_sum if kept is None else of_sum * kept * scale
    return of_x, of_x.sum(0) if of_bias else None


@compiled
def _add_and_norm(
    residual: torch.Tensor,
    x: torch.Tensor | None,
    kept: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    eps: float,
    centred: bool,
) -> Any:
    """The sum (None if nothing was added), its norm, the means, and the inverse deviations, ``[tokens, 1]``."""
    total = residual if x is None else _sum(residual, x, kept, bias, scale).to(x.dtype)
    wide = _wide(total)
    mean = wide.mean(-1, keepdim=True) if centred else None
    wide = wide if mean is None else wide - mean
    scaling = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normal = wide * scaling * _wide(weight)
    normal = normal if shift is None else normal + _wide(shift)
    return None if x is None else total, normal.to(total.dtype), mean, scaling


@compiled
def _norm_backward(
    of_normal: torch.Tensor,
    of_sum: torch.Tensor | None,
    total: torch.Tensor,
    mean: torch.Tensor | None,
    scaling: torch.Tensor,
    kept: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: float,
    of_bias: bool,
    of_weight: bool,
    of_shift: bool,
) -> Any:
    """Gradients of the sum, and (None where they are not asked for) of the block's output, bias, weight and shift.

    A LayerNorm's, as in Ba et al. 2016 (https://arxiv.org/abs/1607.06450); without the means, an RMSNorm's.
    """
    wide = _wide(total)
    unit = (wide if mean is None else wide - mean) * scaling
    given = _wide(of_normal)
    through = given * _wide(weight)
    of_total = through - unit * (through * unit).mean(-1, keepdim=True)
    if mean is not None:
        of_total = of_total - through.mean(-1, keepdim=True)
    of_total = of_total * scaling
    if of_sum is not None:
        of_total = of_total + _wide(of_sum)
    of_x = of_total if kept is None else of_total * kept * scale
    return (
        of_total.to(total.dtype),
        None if kept is None else of_x.to(total.dtype),
        of_x.sum(0).to(total.dtype) if of_bias else None,
        (given * unit).sum(0).to(weight.dtype) if of_weight else None,
        given.sum(0).to(weight.dtype) if of_shift else None,
    )


def _sum(
    residual: torch.Tensor, x: torch.Tensor, kept: torch.Tensor | None, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    x = x if bias is None else x + bias
    return residual + (x if kept is None else x * kept * scale)
