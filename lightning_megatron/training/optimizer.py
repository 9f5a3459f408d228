"""A user's torch optimizer, sharded or mirrored by megatron-core, still a ``torch.optim.Optimizer`` to Lightning."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_megatron.distributed.parameter_names import named_shards
from lightning_megatron.training.engine import Engine, NonFiniteLossError
from lightning_megatron.training.gradients import ExposedGradients
from lightning_megatron.training.timers import OPTIMIZER, timed

OnNonfinite = Literal["raise", "skip", "ignore"]

_SHARDABLE = (AdamW, Adam, SGD)
# How a step is computed, not what: the program's business, whatever a checkpoint says.
IMPLEMENTATION_FLAGS = {"foreach", "fused", "capturable", "differentiable"}


@dataclass(frozen=True)
class ParameterSlice:
    """What one rank updates of a parameter.

    Args:
        parameter: The model's.
        main_param: What the torch optimizer steps: the parameter itself, its fp32 copy, or a flat part of either.
        start: Of a part, its first element within the parameter; None for the whole.
    """

    parameter: torch.nn.Parameter
    main_param: torch.Tensor
    start: int | None


class ShardedOptimizer(Optimizer):
    """megatron-core's optimizer behind torch's face.

    ``param_groups`` and ``state`` are the wrapped torch optimizer's own, so schedulers and monitors that hold on to
    either object see and set the same values.

    Args:
        inner: megatron-core's optimizer around the user's.
        engine: Whose gradients it applies.
        on_nonfinite: What happens when the gradients' norm is NaN or infinite: "raise", "skip" the step, or "ignore".
        given: The groups' settings at the start of the run, before any schedule has moved them.
        weights: The whole model's names of the weights in each group.
        parameters: Of each group as ``configure_optimizers`` gave it, frozen ones included.
    """

    def __init__(
        self,
        inner: MegatronOptimizer,
        engine: Engine,
        on_nonfinite: OnNonfinite,
        given: list[dict[str, Any]],
        weights: list[list[str]],
        parameters: list[list[torch.nn.Parameter]],
    ) -> None:
        # Not `super().__init__`: the groups and the state live in the torch optimizer.
        self.initial_settings = given
        self.group_weight_names = weights
        self.group_parameters = parameters
        self.inner = inner
        self.engine = engine
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.always_compute_norm = False  # set by callbacks that log the norm; clipping computes it in any case
        self.defaults = inner.optimizer.defaults
        self.clip_norm = 0.0
        self.grad_norm: float | None = None
        self.skipped_steps = 0
        self.last_step_was_skipped = False
        self._shown: ExposedGradients | None = None
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()

    def __eq__(self, other: object) -> bool:
        """Schedulers hold the wrapped optimizer: to Lightning, which looks for those without one, it is this one."""
        return other is self or other is self.inner.optimizer

    def __hash__(self) -> int:
        return id(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The torch optimizer's groups; their ``params`` are this rank's shards."""
        return self.inner.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The torch optimizer's state."""
        return self.inner.optimizer.state

    @property
    def loss_scale(self) -> float:
        """The factor on the loss, 1 but for fp16."""
        return float(self.inner.get_loss_scale().item())

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure (zero, forward, backward), then clip and update, unless fp16 gradients overflowed."""
        if self.engine.restore_moved_weights():
            self.copy_changed_weights()
        self.clip_norm = 0.0  # the closure's hooks say anew whether this step is clipped
        result = closure() if closure is not None else None
        self._hide_gradients()
        self.last_step_was_skipped = False
        if self.engine.has_gradients:
            with timed(self.engine.timers, OPTIMIZER):
                self._update()
        return result

    def _update(self) -> None:
        """Clip and update; or skip the step."""
        self.last_step_was_skipped = self.inner.prepare_grads()
        if self.last_step_was_skipped:
            self.skipped_steps += 1
            return
        self.grad_norm = None
        with self.engine.device:  # megatron-core names none for the norms of single tensors
            if self.clip_norm > 0:
                self.grad_norm = self.inner.clip_grad_norm(self.clip_norm)
            elif self.always_compute_norm or self.on_nonfinite == "skip":
                self.grad_norm = self.inner.get_grad_norm()
        if self.grad_norm is not None and not math.isfinite(self.grad_norm):  # the norm is of all ranks: all are here
            if self.on_nonfinite == "raise":
                raise NonFiniteLossError(
                    f"The gradients' norm is {self.grad_norm}; the weights are as the last step left them. Lower the"
                    " learning rate, look at the batch, or leave such steps out: MegatronStrategy(on_nonfinite='skip')."
                )
            if self.on_nonfinite == "skip":
                self.last_step_was_skipped = True
                self.skipped_steps += 1
                return
        self.inner.step_with_ready_grads()
        self.engine.has_gradients = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: gradient buffers are laid out at the start of a run."""
        raise MisconfigurationException(
            "MegatronStrategy: the optimizer takes no further parameters in the middle of a run, since megatron-core's"
            " gradient buffers are laid out at its start. Give it all that is trained in configure_optimizers, and call"
            " fit again for the next phase."
        )

    def register_step_pre_hook(self, hook: Any) -> Any:
        """The wrapped optimizer's, which makes the step."""
        return self.inner.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """The wrapped optimizer's, which makes the step."""
        return self.inner.optimizer.register_step_post_hook(hook)

    @torch.no_grad()
    def copy_changed_weights(self) -> None:
        """Have main weights follow weights that hooks have set; those that only rounding parts stay as exact."""
        for part in self.parameter_slices():
            weight = part.parameter.detach().view(-1)
            if part.start is not None:
                weight = weight[part.start : part.start + part.main_param.numel()]
            main = part.main_param.detach().view(-1)
            main.copy_(torch.where(main.to(weight.dtype) == weight, main, weight.to(main.dtype)))

    def expose_gradients(self) -> None:
        """Put the finished gradients into ``parameter.grad`` until the step goes on; parts into the groups' shards."""
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
        """Forget the gradients of parameters and buffers."""
        self._hide_gradients()  # of a step that an exception has ended
        self.engine.zero_grad()
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The groups' hyper-parameters and the loss scale; the tensors' way into a checkpoint is ``part``."""
        state: dict[str, Any] = {"name": type(self).__name__, "groups": _settings(self), "given": self.initial_settings}
        state["skipped_steps"] = self.skipped_steps
        if getattr(self.inner, "grad_scaler", None) is not None:
            state["grad_scaler"] = self.inner.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave, under any layout and precision.

        Raises:
            ValueError: It is the state of another kind of optimizer, or has other groups.
        """
        self.check_kind(state_dict)
        for group, saved in zip(self.param_groups, state_dict["groups"], strict=True):
            set_values(group, {key: value for key, value in saved.items() if key not in IMPLEMENTATION_FLAGS})
        self.initial_settings = state_dict.get("given", self.initial_settings)
        self.skipped_steps = state_dict["skipped_steps"]
        if "grad_scaler" in state_dict and getattr(self.inner, "grad_scaler", None) is not None:
            self.inner.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def check_kind(self, state_dict: dict[str, Any]) -> None:
        """Refuse the state of another kind of optimizer, or of other groups.

        Raises:
            ValueError: With both.
        """
        if state_dict["name"] != type(self).__name__ or len(state_dict["groups"]) != len(self.param_groups):
            raise ValueError(
                f"The checkpoint has the state of {state_dict['name']} with {len(state_dict['groups'])} groups, and"
                f" this run's optimizer is {type(self).__name__} with {len(self.param_groups)}. Use the same one, or"
                " start from the weights alone (GPTModule.load_from_checkpoint, then fit without ckpt_path)."
            )

    def trains(self, module: torch.nn.Module) -> bool:
        """Whether what it updates are weights of ``module``."""
        own = {id(parameter) for parameter in module.parameters()}
        return all(id(part.parameter) in own for part in self.parameter_slices())

    def parameter_slices(self) -> Iterator[ParameterSlice]:
        """Every parameter, or part of one, that this rank updates."""
        if isinstance(self.inner, DistributedOptimizer):
            for parameter, (group, number) in self.inner.model_param_group_index_map.items():
                part = self.inner._get_model_param_range_map(parameter)["param"]
                yield ParameterSlice(parameter, self.param_groups[group]["params"][number], int(part.start))
        else:
            for chunk in self.engine.chunks:
                for parameter in chunk.parameters():
                    if parameter.requires_grad:
                        yield ParameterSlice(parameter, getattr(parameter, "main_param", parameter), None)


def is_shardable(optimizer: Optimizer) -> bool:
    """Whether the distributed optimizer can make its update: one that is element by element."""
    return type(optimizer) in _SHARDABLE


def shard(
    optimizer: Optimizer,
    engine: Engine,
    *,
    params_dtype: torch.dtype,
    distributed: bool,
    initial_loss_scale: float | None,
    on_nonfinite: OnNonfinite,
) -> ShardedOptimizer:
    """Hand a torch optimizer to megatron-core, groups and hyper-parameters kept.

    Args:
        optimizer: The user's.
        engine: Holds the model chunks.
        params_dtype: Type of the weights.
        distributed: Whether state and main weights are sharded over the data-parallel group.
        initial_loss_scale: First loss scale under fp16; None without one.
        on_nonfinite: What happens when the gradients' norm is NaN or infinite.

    Raises:
        TypeError: An optimizer that cannot be sharded.
    """
    if distributed and type(optimizer) not in _SHARDABLE:
        raise TypeError(
            f"MegatronStrategy(distributed_optimizer=True) shards torch.optim.AdamW, Adam and SGD, not"
            f" {type(optimizer).__name__}: an update that is not element by element would come out wrong on flat"
            " shards. Use one of these, or distributed_optimizer=False."
        )
    _check_types(engine, params_dtype)
    parameters = [list(group["params"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:  # torch passes frozen ones over in each step; megatron-core does not take them
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    given = _settings(optimizer)
    known = {id(parameter): name for chunk in engine.chunks for name, parameter in named_shards(chunk.module)}
    weights = [[known[id(p)] for p in group["params"] if id(p) in known] for group in optimizer.param_groups]
    config = OptimizerConfig(
        optimizer="sgd" if isinstance(optimizer, SGD) else "adam",
        lr=optimizer.defaults["lr"],
        bf16=params_dtype == torch.bfloat16,
        fp16=initial_loss_scale is not None,
        params_dtype=params_dtype,
        use_distributed_optimizer=distributed,
        overlap_param_gather=engine.chunks[0].ddp_config.overlap_param_gather,
    )
    scaler = None if initial_loss_scale is None else _grad_scaler(initial_loss_scale)
    inner = _wrap(optimizer, config, scaler, engine)
    engine.config.grad_scale_func = inner.scale_loss if scaler is not None else None
    # Named as the user's: LearningRateMonitor and progress bars show the name.
    named = type(type(optimizer).__name__, (ShardedOptimizer,), {})
    return named(inner, engine, on_nonfinite, given, weights, parameters)


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the groups say beside their parameters, as plain data."""
    return [
        {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def set_values(group: dict[str, Any], values: dict[str, Any]) -> None:
    """Give a group other settings; a rate that is a tensor stays one."""
    for key, value in values.items():
        if isinstance(group.get(key), torch.Tensor):
            group[key].fill_(value)
        else:
            group[key] = value


def _plain(value: Any) -> Any:
    """A rate that is a tensor as a number, and a list (of YAML) as the tuple that is torch's own default."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def _wrap(optimizer: Optimizer, config: OptimizerConfig, scaler: Any, engine: Engine) -> MegatronOptimizer:
    named = ProcessGroupCollection.setup_process_groups_for_optimizer(
        None, engine.chunks, use_gloo_process_groups=torch.distributed.get_backend() != "gloo"
    )
    if config.use_distributed_optimizer:
        with _any_elementwise_optimizer():
            inner = DistributedOptimizer(
                optimizer,
                config,
                scaler,
                _no_state_yet,
                model_chunks=engine.chunks,
                per_model_buffers={i: chunk.buffers for i, chunk in enumerate(engine.chunks)},
                data_parallel_group=named["intra_dp_cp_group"],
                data_parallel_group_gloo=named["intra_dp_cp_group_gloo"],
                data_parallel_group_idx=torch.distributed.get_rank(named["mp_group"]),
                distributed_optimizer_instance_id=0,
            )
        inner.grad_stats_parallel_group = named["intra_dist_opt_group"]
    elif config.bf16 or config.fp16:
        inner = Float16OptimizerWithFloat16Params(optimizer, config, scaler, _no_state_yet)
        inner.grad_stats_parallel_group = named["mp_group"]
    else:
        inner = FP32Optimizer(optimizer, config, _no_state_yet)
        inner.grad_stats_parallel_group = named["mp_group"]
    return inner


def _grad_scaler(initial_loss_scale: float) -> DynamicGradScaler:
    """torch's GradScaler schedule, with Megatron's hysteresis of two overflows."""
    return DynamicGradScaler(
        initial_scale=initial_loss_scale,
        min_scale=1.0,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=1000,
        hysteresis=2,
    )


@contextmanager
def _any_elementwise_optimizer() -> Iterator[None]:
    """Lift the check that ``DistributedOptimizer`` makes for its own checkpoint format: Adam only (0.16.1)."""
    allowed = distrib_optimizer.Adam
    distrib_optimizer.Adam = (allowed, *_SHARDABLE)
    try:
        yield
    finally:
        distrib_optimizer.Adam = allowed


def _no_state_yet(*_: Any) -> None:
    """torch optimizers make their state in the first step."""


def _check_types(engine: Engine, params_dtype: torch.dtype) -> None:
    others = [(n, p) for c in engine.chunks for n, p in c.module.named_parameters() if p.dtype != params_dtype]
    for name, parameter in others:
        if parameter.requires_grad:
            raise TypeError(
                f"{name} is {parameter.dtype}, and this run trains {params_dtype} weights: megatron-core's buffers have"
                f" one type. Make it {params_dtype} in configure_model, freeze it, or choose another"
                " Trainer(precision=)."
            )
