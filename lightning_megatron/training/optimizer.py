"""``ShardedOptimizer``: megatron-core's optimizer around the user's, presented to Lightning as a torch optimizer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.optim import Optimizer

from lightning_megatron.training.engine import Engine
from lightning_megatron.training.gradient_norm import clip_gradients, gradient_norm
from lightning_megatron.training.gradients import ExposedGradients
from lightning_megatron.training.nonfinite import (
    OnNonfinite,
    Unfit,
    can_withhold,
    stop_on_bad_loss,
    stop_on_bad_norm,
    withheld,
)
from lightning_megatron.training.timers import OPTIMIZER, timed

# These flags say how a step is computed, and where its state is: they are the program's, never the checkpoint's.
IMPLEMENTATION_FLAGS = {
    "foreach", "fused", "capturable", "differentiable", "exp_avg_dtype", "exp_avg_sq_dtype", "on_host"
}  # fmt: skip

# Optimizers by the names of others that have the same state, so that a run goes on from one with the other.
_SAME_STATE = {"LeanAdamW": "AdamW"}


@dataclass(frozen=True)
class ParameterSlice:
    """The slice of a parameter that this rank's optimizer updates.

    Args:
        parameter: The model's parameter on this rank.
        main_param: The tensor that the torch optimizer updates: the parameter itself, its fp32 copy, or a flat slice of
            either.
        start: The offset of the slice in the flattened parameter; None if it is the whole parameter.
    """

    parameter: torch.nn.Parameter
    main_param: torch.Tensor
    start: int | None


class ShardedOptimizer(Optimizer):
    """megatron-core's optimizer as a ``torch.optim.Optimizer``.

    ``param_groups`` and ``state`` are the wrapped torch optimizer's own, so schedulers and monitors that hold on to
    either object see and set the same values.

    Args:
        inner: megatron-core's optimizer around the user's.
        engine: The engine whose gradients it applies.
        on_nonfinite: What happens when a loss, or the gradient norm where it is computed, is NaN or infinite: "raise",
            "skip" the step for its norm, or "ignore". The first two read from the device once a step, after the
            backward pass; "ignore" never does.
        initial_settings: The settings of each group at the start of the run, before any schedule changes them.
        group_weight_names: The names, in the whole model, of the weights of each group.
        group_parameters: The parameters of each group as ``configure_optimizers`` gave them, frozen ones included.
    """

    def __init__(
        self,
        inner: MegatronOptimizer,
        engine: Engine,
        on_nonfinite: OnNonfinite,
        initial_settings: list[dict[str, Any]],
        group_weight_names: list[list[str]],
        group_parameters: list[list[torch.nn.Parameter]],
    ) -> None:
        # `super().__init__` is not called: the groups and the state are those of the wrapped torch optimizer.
        self.initial_settings = initial_settings
        self.group_weight_names = group_weight_names
        self.group_parameters = group_parameters
        self.inner = inner
        self.engine = engine
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.always_compute_norm = False  # set by callbacks that log the norm; clipping computes it in any case
        self.defaults = inner.optimizer.defaults
        self.clip_norm = 0.0
        self._grad_norm: torch.Tensor | None = None
        self.step_number = 0  # of the run, for messages; set by the strategy
        self.skipped_steps = 0
        self.last_step_was_skipped = False
        self._shown: ExposedGradients | None = None
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()

    def __eq__(self, other: object) -> bool:
        """Equal to the wrapped optimizer too: schedulers hold that one, and Lightning looks their optimizer up."""
        return other is self or other is self.inner.optimizer

    def __hash__(self) -> int:
        return id(self)

    @property
    def kind(self) -> str:
        """The name of the wrapped optimizer's class."""
        return type(self).__name__

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the wrapped torch optimizer; their ``params`` are this rank's slices."""
        return self.inner.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped torch optimizer."""
        return self.inner.optimizer.state

    @property
    def grad_norm(self) -> float | None:
        """The gradients' norm in the last step, before clipping; None if it was not computed. Waits for the device."""
        return None if self._grad_norm is None else float(self._grad_norm)

    @property
    def loss_scale(self) -> float:
        """The factor on the loss; 1 except in fp16, where asking for it waits for the device."""
        scales = getattr(self.inner, "grad_scaler", None) is not None
        return float(self.inner.get_loss_scale()) if scales else 1.0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure (zero, forward, backward), then clip and update, unless fp16 gradients overflowed."""
        if self.engine.restore_moved_weights():
            self.copy_changed_weights()
        self.clip_norm = 0.0  # the hooks that the closure runs set it again if this step is clipped
        result = closure() if closure is not None else None
        self._hide_gradients()
        self.last_step_was_skipped = False
        if self.engine.has_gradients:
            with timed(self.engine.timers, OPTIMIZER):
                self._update()
        else:
            self._stop_on_losses()
        return result

    def _update(self) -> None:
        """Clip the gradients and update the weights, or skip the step."""
        self.last_step_was_skipped = self.inner.prepare_grads()
        if self.last_step_was_skipped:
            self.skipped_steps += 1
            self._stop_on_losses()  # an fp16 overflow is skipped, and a loss that is NaN is not
            return
        norm = None
        if self.clip_norm > 0 or self.always_compute_norm or self.on_nonfinite == "skip":
            norm = gradient_norm(self.inner, self.engine.device)
        self._grad_norm = norm
        if norm is not None and self.clip_norm > 0:
            clip_gradients(self.inner, self.clip_norm, norm)
        unfit = self._unfit(norm)
        # A fused step is started before the host has heard: the device does not wait for it, and leaves the step out.
        looks_later = can_withhold(self.inner.optimizer)
        if not looks_later and self._refuses(unfit, norm):
            return
        with withheld(self.inner.optimizer, unfit):
            self.inner.step_with_ready_grads()
        if looks_later and self._refuses(unfit, norm):
            return
        self.engine.has_gradients = False

    def _stop_on_losses(self) -> None:
        """Stop on a bad loss in a step that is left out in any case."""
        if self.on_nonfinite == "raise":
            self._refuses(self._unfit(None), None)

    def _unfit(self, norm: torch.Tensor | None) -> Unfit:
        """Whether a value that ``on_nonfinite`` looks at is NaN or infinite: the norm, or also the window's losses."""
        norms = [] if norm is None else [norm]
        losses = [loss for loss, _ in self.engine.window_losses]
        return Unfit({"raise": [*losses, *norms], "skip": norms, "ignore": []}[self.on_nonfinite])

    def _refuses(self, unfit: Unfit, norm: torch.Tensor | None) -> bool:
        """Whether the step is left out.

        Raises:
            NonFiniteLossError: It is to end the run.
        """
        if not unfit:
            return False
        if self.on_nonfinite == "raise":
            for loss, local_loss in self.engine.window_losses:
                stop_on_bad_loss(loss, local_loss, self.step_number)
            if norm is not None:
                stop_on_bad_norm(norm)
        self.last_step_was_skipped = True
        self.skipped_steps += 1
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: gradient buffers are laid out at the start of a run."""
        raise MisconfigurationException(
            "MegatronStrategy: parameters cannot be added to the optimizer during a run, since megatron-core's gradient"
            " buffers are laid out at its start. Pass every parameter that is trained to the optimizer in"
            " configure_optimizers, and call fit again for the next phase."
        )

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Register the hook with the wrapped optimizer, which makes the step."""
        return self.inner.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Register the hook with the wrapped optimizer, which makes the step."""
        return self.inner.optimizer.register_step_post_hook(hook)

    @torch.no_grad()
    def copy_changed_weights(self) -> None:
        """Copy weights that hooks have changed to the main weights; a main weight that rounds to its weight is kept."""
        for part in self.parameter_slices():
            weight = part.parameter.detach().view(-1)
            if part.start is not None:
                weight = weight[part.start : part.start + part.main_param.numel()]
            main = part.main_param.detach().view(-1)
            main.copy_(torch.where(main.to(weight.dtype) == weight, main, weight.to(main.dtype)))

    def expose_gradients(self) -> None:
        """Expose the finished gradients as ``parameter.grad`` until the step continues."""
        self._shown = ExposedGradients(self.engine, self.loss_scale)
        for part in self.parameter_slices():
            gradient = part.parameter.main_grad.view(-1)  # type: ignore[attr-defined]
            if part.start is not None and gradient.dtype == part.main_param.dtype:
                part.main_param.grad = gradient[part.start : part.start + part.main_param.numel()].view_as(
                    part.main_param
                )

    def _hide_gradients(self) -> None:
        if self._shown is None:
            return
        if not self._shown.take_back():
            self.engine.has_gradients = False
        self._shown = None
        for part in self.parameter_slices():
            if part.start is not None:
                part.main_param.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients of parameters and buffers."""
        self._hide_gradients()  # of a step that an exception has interrupted
        self.engine.zero_grad()
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings of the groups and the loss scale; checkpoints read tensors from ``parameter_slices``."""
        state: dict[str, Any] = {
            "name": self.kind,
            "groups": group_settings(self),
            "given": self.initial_settings,
        }
        state["skipped_steps"] = self.skipped_steps
        if getattr(self.inner, "grad_scaler", None) is not None:
            state["grad_scaler"] = self.inner.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, under any layout and precision.

        Raises:
            ValueError: It is the state of another kind of optimizer, or has another number of groups.
        """
        self.check_kind(state_dict)
        take_settings(self.inner.optimizer, state_dict)
        self.initial_settings = state_dict.get("given", self.initial_settings)
        self.skipped_steps = state_dict["skipped_steps"]
        if "grad_scaler" in state_dict and getattr(self.inner, "grad_scaler", None) is not None:
            self.inner.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def check_kind(self, state_dict: dict[str, Any]) -> None:
        """Refuse the state of another kind of optimizer, or with another number of groups.

        Raises:
            ValueError: The kinds or the numbers of groups differ; the text has both.
        """
        check_kind(self.kind, len(self.param_groups), state_dict)

    def trains(self, module: torch.nn.Module) -> bool:
        """Whether all weights that it updates belong to ``module``."""
        own = {id(parameter) for parameter in module.parameters()}
        return all(id(part.parameter) in own for part in self.parameter_slices())

    def parameter_slices(self) -> Iterator[ParameterSlice]:
        """Every slice of a parameter that this rank updates."""
        if isinstance(self.inner, DistributedOptimizer):
            for parameter, (group, number) in self.inner.model_param_group_index_map.items():
                start = _start_of_slice(self.inner, parameter)
                yield ParameterSlice(parameter, self.param_groups[group]["params"][number], start)
        else:
            for chunk in self.engine.chunks:
                for parameter in chunk.parameters():
                    if parameter.requires_grad:
                        yield ParameterSlice(parameter, getattr(parameter, "main_param", parameter), None)


def _start_of_slice(inner: DistributedOptimizer, parameter: torch.nn.Parameter) -> int:
    """Where this rank's slice starts in the flattened parameter; private in megatron-core (0.16.1)."""
    return int(inner._get_model_param_range_map(parameter)["param"].start)


def group_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each group, without its parameters, as plain data."""
    return [
        {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def check_kind(kind: str, groups: int, state: dict[str, Any]) -> None:
    """Refuse the state of another kind of optimizer, or with another number of groups.

    Args:
        kind: The name of this run's optimizer class.
        groups: The number of its groups.
        state: The value that ``state_dict`` of the saved optimizer returned.

    Raises:
        ValueError: The kinds or the numbers of groups differ; the text has both.
    """
    same = _SAME_STATE.get(state["name"], state["name"]) == _SAME_STATE.get(kind, kind)
    if not same or len(state["groups"]) != groups:
        raise ValueError(
            f"The checkpoint has the state of {state['name']} with {len(state['groups'])} groups, and this run's"
            f" optimizer is {kind} with {groups}. Use the same optimizer, or start from the weights alone"
            " (GPTModule.load_from_checkpoint, then fit without ckpt_path)."
        )


def take_settings(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer's groups the settings of a saved ``state``, but for the flags of how a step is computed.

    Raises:
        ValueError: The optimizer cannot follow one of the settings.
    """
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        set_values(group, {key: value for key, value in saved.items() if key not in IMPLEMENTATION_FLAGS | {"params"}})
    if check := getattr(optimizer, "check_groups", None):
        check()


def set_values(group: dict[str, Any], values: dict[str, Any]) -> None:
    """Set values of a group; a learning rate that is a tensor stays the same tensor."""
    for key, value in values.items():
        if isinstance(group.get(key), torch.Tensor):
            group[key].fill_(value)
        else:
            group[key] = value


def _plain(value: Any) -> Any:
    """A tensor of one element as a number, and a list (from YAML) as a tuple, like torch's defaults."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return tuple(value) if isinstance(value, list) else value
