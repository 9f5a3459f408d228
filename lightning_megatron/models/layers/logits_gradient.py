"""The softmax of a chunk of logits, and its gradient in the logits' place, as they are or through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_megatron.models.layers.fused.compiled import compiled as compile_on_first_call


def statistics(compiled: bool) -> Callable[..., torch.Tensor]:
    """The function that computes what the loss needs of each token's logits, in fp32.

    Its arguments are the logits ``[n, v]``, the labels' columns ``[n]`` (−1: none), and how many logits are summed, or
    None. It returns ``[2, n]`` or ``[3, n]``: the logarithm of the sum of exponentials, the label's logit (0 without
    one), and the sum of the logits.
    """
    return _compiled_statistics if compiled else _statistics


def into(compiled: bool) -> Callable[..., None]:
    """The function that puts the gradient in the place of the logits ``[n, v]``.

    Its further arguments are the logarithms of the sums of exponentials over the whole vocabulary ``[n]``, the labels'
    columns ``[n]`` (−1: none), the factors ``[2, n]`` or ``[3, n]`` of the softmax, of −1 at the label and of −1 at all
    ids, and the number of ids.
    """
    return _compiled_gradient if compiled else _gradient


def _statistics(logits: torch.Tensor, targets: torch.Tensor, summed: int | None) -> torch.Tensor:
    label_logits = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()
    found = [torch.logsumexp(logits.float(), 1), torch.where(targets >= 0, label_logits, 0.0)]
    if summed is not None:
        found.append(logits[:, :summed].float().sum(1))
    return torch.stack(found)


def _gradient(logits: torch.Tensor, lse: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor, ids: int) -> None:
    exact = logits.float()  # itself in fp32
    exact.sub_(lse[:, None]).exp_().mul_(factors[0][:, None])
    exact.scatter_add_(1, targets.clamp(min=0)[:, None], torch.where(targets >= 0, -factors[1], 0.0)[:, None])
    if len(factors) == 3:
        exact[:, :ids].sub_(factors[2][:, None])
    if exact is not logits:
        logits.copy_(exact)


def _joined_gradient(
    logits: torch.Tensor, lse: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor, ids: int
) -> None:
    """As ``_gradient``, in one expression, of which a compiler makes one pass over the logits."""
    columns = torch.arange(logits.size(1), device=logits.device)
    gradient = (logits.float() - lse[:, None]).exp() * factors[0][:, None]
    gradient = gradient - torch.where(columns == targets[:, None], factors[1][:, None], 0.0)
    if len(factors) == 3:
        gradient = gradient - torch.where(columns < ids, factors[2][:, None], 0.0)
    logits.copy_(gradient)


_compiled_statistics = compile_on_first_call(_statistics)
_compiled_gradient = compile_on_first_call(_joined_gradient)
