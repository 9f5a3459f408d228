"""``Muon``: orthogonalised momentum for the matrices of a transformer, AdamW for its other weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Keller Jordan's quintic iteration, kellerjordan.github.io/posts/muon


@answer_wrong_names
class Muon(Optimizer):
    """Muon (kellerjordan.github.io/posts/muon) for the weights of linear layers, AdamW for all others.

    The update of a matrix is the orthogonal part of its momentum. A weight that is divided over tensor-parallel ranks
    is orthogonalised as a whole, from the momentum that is gathered over these ranks, so every layout trains the same
    model; megatron-core calls this the duplicated mode. Each expert of a mixture has matrices of its own. Embeddings,
    output layers, routers, norms and biases are AdamW's. It needs ``MegatronStrategy(distributed_optimizer=False)``,
    which keeps each weight in one piece on its replicas.

    Args:
        params: Weights or groups of weights of a Megatron module.
        lr: Learning rate of both.
        weight_decay: Decoupled weight decay of both.
        momentum: Decay of the average of the gradient that is orthogonalised.
        nesterov: Whether the gradient is averaged with that average once more.
        ns_steps: Steps of the Newton-Schulz iteration, in bf16.
        adjust_lr_fn: Factor of ``lr`` for a matrix ``[rows, columns]``: "match_rms_adamw" is
            ``0.2 · sqrt(max(rows, columns))`` (arXiv 2502.16982), and "original" ``sqrt(max(1, rows / columns))``.
        betas: AdamW's.
        eps: AdamW's.

    Raises:
        ValueError: A value that is none of these, or weights of a plain module, which do not say what they are.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        arguments = Arguments("Muon")
        arguments.number(least=0, lr=lr, weight_decay=weight_decay, momentum=momentum, eps=eps)
        arguments.flag(nesterov=nesterov)
        arguments.whole(ns_steps=ns_steps)
        arguments.one_of(("original", "match_rms_adamw"), adjust_lr_fn=adjust_lr_fn)
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn, "betas": betas, "eps": eps,
        }  # fmt: skip
        super().__init__(_split(list(params)), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, if there is one, and update every weight that has a gradient."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    update = self._update_matrix if group["orthogonal"] else self._update_other
                    update(weight, weight.grad, group)
        return result

    def _update_matrix(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        whole = _gathered(update, weight)
        rows, columns = whole.shape[-2:]
        factor = 0.2 * math.sqrt(max(rows, columns))
        if group["adjust_lr_fn"] == "original":
            factor = math.sqrt(max(1, rows / columns))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(_own_part(_orthogonal(whole, group["ns_steps"]), weight), alpha=-float(group["lr"]) * factor)

    def _update_other(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            state.update(step=torch.zeros((), device="cpu"), **zeros)
        adamw(
            [weight], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip


def _split(params: list[Any]) -> list[dict[str, Any]]:
    """Two groups for each: its matrices, which are orthogonalised, and its other weights; both on every rank."""
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    if not any(hasattr(weight, "tensor_model_parallel") for group in groups for weight in group["params"]):
        raise ValueError(
            "Muon: these are no weights of a Megatron module, so that it cannot tell linear layers from embeddings. Use"
            " torch.optim.Muon for the one, and another optimizer for the others, or AdamW for all."
        )
    split = []
    for group in groups:
        for orthogonal in (True, False):
            members = [weight for weight in group["params"] if _is_matrix(weight) is orthogonal]
            made = {**group, "params": members, "orthogonal": orthogonal}
            if "name" in group and not orthogonal:
                made["name"] = f"{group['name']}_adamw"
            split.append(made)
    return split


def _is_matrix(weight: torch.Tensor) -> bool:
    """Whether it is a linear layer's, but for output layers: megatron-core marks these and its parallel layers.

    The experts of a rank have theirs in one tensor ``[experts, rows, columns]``.
    """
    is_other = any(hasattr(weight, mark) for mark in ("is_embedding_or_output_parameter", "is_expert_bias"))
    return weight.dim() in (2, 3) and hasattr(weight, "tensor_model_parallel") and not is_other


def _gathered(update: torch.Tensor, weight: Any) -> torch.Tensor:
    """The update of the whole matrix, of which ``weight`` is this rank's part; the order of its rows is any."""
    if not weight.tensor_model_parallel or (group := _sharers(weight)).size() == 1:
        return update
    parts = [torch.empty_like(update) for _ in range(group.size())]
    dist.all_gather(parts, update.contiguous(), group=group)
    return torch.cat(parts, dim=weight.partition_dim)


def _own_part(whole: torch.Tensor, weight: Any) -> torch.Tensor:
    if whole.shape == weight.shape:
        return whole
    group = _sharers(weight)
    return whole.chunk(group.size(), dim=weight.partition_dim)[group.rank()]


def _sharers(weight: torch.Tensor) -> dist.ProcessGroup:
    """The ranks that a matrix, or those of experts, are divided over."""
    return process_groups.expert_tensor_parallel() if weight.dim() == 3 else process_groups.tensor_parallel()


def _orthogonal(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Its orthogonal factor, nearly: singular values become some 0.5 to 1.5, by a Newton-Schulz iteration in bf16.

    Args:
        matrix: ``[rows, columns]``, or several of them.
        steps: Steps of the iteration.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    x = x if x.dim() == 3 else x.unsqueeze(0)
    is_tall = x.size(1) > x.size(2)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrix.dtype).reshape(matrix.shape)
