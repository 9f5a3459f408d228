"""``LeanAdamW``: AdamW whose moments take less of a device's memory, in bf16 or in the memory of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import AdamW, adamw
from torch.optim.optimizer import ParamsT

from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.training.moment_types import LARGEST_BETA_IN_BF16, MomentType


@answer_wrong_names
class LeanAdamW(AdamW):
    """torch's AdamW (decoupled weight decay, arXiv 1711.05101) with another type or place for its moments.

    A step computes in fp32 on the weights' device, one weight after the other; bf16 moments are rounded to nearest
    afterwards. With fp32 moments it gives torch's fused AdamW to the bit. Bytes per weight, beside 4 for the main
    weight and 4 for the gradient: 8 in fp32, 6 with ``exp_avg_dtype="bfloat16"``, 4 with both in bf16, and none on the
    device with ``on_host=True``.

    Args:
        params: Weights or groups of weights.
        lr: Learning rate.
        betas: Decay of the averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        exp_avg_dtype: Type of the average of the gradient.
        exp_avg_sq_dtype: Type of the average of its square; "bfloat16" needs ``betas[1]`` of at most 0.98.
        on_host: Whether the moments are in pinned memory of the host. Each step reads and writes them over the bus
            once, and the host waits for it.

    Raises:
        ValueError: A value that is none of these, a ``betas[1]`` that averages over too many steps for bf16, or a group
            with ``maximize`` or ``amsgrad``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        exp_avg_dtype: MomentType = "float32",
        exp_avg_sq_dtype: MomentType = "float32",
        on_host: bool = False,
    ) -> None:
        arguments = Arguments("LeanAdamW")
        arguments.one_of(("float32", "bfloat16"), exp_avg_dtype=exp_avg_dtype, exp_avg_sq_dtype=exp_avg_sq_dtype)
        arguments.flag(on_host=on_host)
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        own = {"exp_avg_dtype": exp_avg_dtype, "exp_avg_sq_dtype": exp_avg_sq_dtype, "on_host": on_host}
        self.defaults.update(own)
        for group in self.param_groups:
            group.update({**own, **group})
        self.check_groups()

    def check_groups(self) -> None:
        """Refuse settings of a group that a step does not have, or that bf16 moments cannot follow.

        Raises:
            ValueError: A group asks for ``maximize`` or ``amsgrad``, or averages over too many steps for bf16.
        """
        for group in self.param_groups:
            for name in ("maximize", "amsgrad"):
                if group.get(name):
                    raise ValueError(
                        f"LeanAdamW: a group of weights has {name}={group[name]}, which LeanAdamW does not have. Leave"
                        " it out, or use torch.optim.AdamW."
                    )
            if group["exp_avg_sq_dtype"] == "bfloat16" and group["betas"][1] > LARGEST_BETA_IN_BF16:
                raise ValueError(
                    f"LeanAdamW(betas={group['betas']}, exp_avg_sq_dtype='bfloat16'): an average in bf16 stands still"
                    f" where a step changes it by less than 1/256. Use betas[1] of at most {LARGEST_BETA_IN_BF16}, or"
                    " leave exp_avg_sq_dtype out."
                )

    # As in torch's fused optimizers, a step changes nothing where the attribute `found_inf` is 1.
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
                    self._update(weight, weight.grad, group)
        if any(group["on_host"] for group in self.param_groups) and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the moments may be read, by a checkpoint
        return result

    def _update(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state.update({name: zero_moment(name, weight, group) for name in ("exp_avg", "exp_avg_sq")})
        kept = [state["exp_avg"], state["exp_avg_sq"]]
        first, second = (moment.to(weight.device, torch.float32, non_blocking=True) for moment in kept)
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [gradient], [first], [second], [], [state["step"]], fused=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None),
        )  # fmt: skip
        for moment, new in zip(kept, (first, second), strict=True):
            if new is not moment:
                moment.copy_(new, non_blocking=True)


def zero_moment(name: str, weight: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Zeros for the state ``name`` of a weight, of the type and in the place that the weight's group says.

    Args:
        name: "exp_avg" or "exp_avg_sq"; any other state, and that of another optimizer, is like the weight.
        weight: The weight that the optimizer updates.
        group: The parameter group that the parameter is in, with its settings.
    """
    if f"{name}_dtype" not in group:
        return torch.zeros_like(weight)
    dtype = getattr(torch, group[f"{name}_dtype"])
    if group["on_host"] and weight.is_cuda:
        return torch.zeros(weight.shape, dtype=dtype, device="cpu", pin_memory=True)
    return torch.zeros_like(weight, dtype=dtype)
