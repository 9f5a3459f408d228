"""``LRSchedule``: Megatron's schedule of learning rate and weight decay, and the torch scheduler that follows it."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_megatron.distributed.arguments import Arguments

Style = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WSDDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
WeightDecayStyle = Literal["constant", "linear", "cosine"]
Unit = Literal["steps", "samples"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    "wsd_decay_style": ("exponential", "linear", "cosine", "minus_sqrt"),
    "weight_decay_style": ("constant", "linear", "cosine"),
    "unit": ("steps", "samples"),
}
_FAR = 2**53  # a horizon for what does not depend on one: a constant schedule, and every schedule at its start


@dataclass(frozen=True)
class LRSchedule:
    """Megatron's schedule: a linear warm-up to the optimizer's learning rate, then a decay, step by step.

    It says what ``megatron.core.optimizer_param_scheduler.OptimizerParamScheduler`` computes. The peak is the ``lr`` of
    the optimizer; parameter groups with other rates keep their ratio to it, also in ``min_lr``. All lengths are
    optimizer steps, or samples with ``unit="samples"``, and count from the start of training.

    Args:
        style: Of the decay after the warm-up. "inverse-square-root" follows 1/√step; "WSD" (warm-up, stable, decay)
            stays at the peak until ``wsd_decay_steps`` before the end; "constant" stays there.
        warmup_steps: Length of the warm-up.
        warmup_fraction: The same as a fraction of ``decay_steps``, in place of ``warmup_steps``.
        decay_steps: Where the decay ends, warm-up included; ``min_lr`` holds from there on. None: the length of the
            run, that is the Trainer's ``max_steps``, or without it ``estimated_stepping_batches``.
        min_lr: Floor of the decay.
        init_lr: Where the warm-up begins, for every parameter group alike, as in Megatron.
        unit: "steps", or "samples" of the global batch: each step counts data-parallel size × ``batch_size`` of the
            loader × ``accumulate_grad_batches``, or what its ``RampUpBatches`` give.
        weight_decay_style: "constant" leaves the optimizer's weight decay, or sets it where start and end are given
            (and equal). "linear" and "cosine" raise it from start to end; groups without weight decay stay without.
        start_weight_decay: First weight decay.
        end_weight_decay: Last weight decay, not below the first.
        weight_decay_steps: Where the last weight decay is reached. None: as ``decay_steps``.
        wsd_decay_steps: Length of WSD's decay.
        wsd_decay_style: Of WSD's decay; "exponential" where it is left out.

    Raises:
        ValueError: An unknown choice, or arguments that contradict each other.
    """

    style: Style = "linear"
    _: KW_ONLY
    warmup_steps: int = 0
    warmup_fraction: float | None = None
    decay_steps: int | None = None
    min_lr: float = 0.0
    init_lr: float = 0.0
    unit: Unit = "steps"
    weight_decay_style: WeightDecayStyle = "constant"
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_steps: int | None = None
    wsd_decay_steps: int | None = None
    wsd_decay_style: WSDDecayStyle | None = None

    def __post_init__(self) -> None:
        """Refuse choices that do not exist and arguments that contradict each other."""
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known and not (name == "wsd_decay_style" and value is None):
                raise _refusal(f"{name}={value!r} is unknown. Use one of {', '.join(map(repr, known))}.")
        self._check_rates()
        self._check_lengths()
        self._check_weight_decay()
        self._check_wsd()

    def build(
        self, optimizer: Optimizer, trainer: pl.Trainer | None = None, *, samples_per_step: int | None = None
    ) -> MegatronLRScheduler:
        """The torch scheduler of this schedule; give it to Lightning with ``"interval": "step"``.

        Args:
            optimizer: Whose groups it sets; their ``lr`` is the peak.
            trainer: Knows the length of the run (``decay_steps=None``) and the global batch (``unit="samples"``);
                not needed without these.
            samples_per_step: Samples of the global batch, where the Trainer's loader does not tell its ``batch_size``.

        Raises:
            ValueError: Rates that contradict the optimizer's, or nobody to ask.
            MisconfigurationException: The Trainer never ends.
        """
        return MegatronLRScheduler(optimizer, self, trainer, samples_per_step)

    @property
    def raises_weight_decay(self) -> bool:
        """Whether the weight decay changes over the steps."""
        return self.weight_decay_style != "constant"

    @property
    def needs_horizon(self) -> bool:
        """Whether ``decay_steps`` matters."""
        raises_until_the_end = self.raises_weight_decay and self.weight_decay_steps is None
        return self.style != "constant" or bool(self.warmup_fraction) or raises_until_the_end

    def megatron_scheduler(self, max_lr: float, decay_steps: int) -> OptimizerParamScheduler:
        """megatron-core's own scheduler of this schedule, over no parameters: only its formulas are asked.

        Args:
            max_lr: The peak.
            decay_steps: The horizon, where ``decay_steps`` is None.
        """
        fraction = self.warmup_fraction
        return OptimizerParamScheduler(
            SimpleNamespace(param_groups=[]),
            init_lr=self.init_lr,
            max_lr=max_lr,
            min_lr=self.min_lr,
            lr_warmup_steps=self.warmup_steps if fraction is None else fraction * decay_steps,
            lr_decay_steps=decay_steps,
            lr_decay_style=self.style,
            start_wd=self.start_weight_decay or 0.0,
            end_wd=self.end_weight_decay or 0.0,
            wd_incr_steps=self.weight_decay_steps or decay_steps,
            wd_incr_style=self.weight_decay_style,
            wsd_decay_steps=self.wsd_decay_steps,
            lr_wsd_decay_style=self.wsd_decay_style or "exponential",
        )

    def _check_lengths(self) -> None:
        for name in ("warmup_steps", "decay_steps", "weight_decay_steps", "wsd_decay_steps"):
            value, least = getattr(self, name), 0 if name == "warmup_steps" else 1
            if value is None and name != "warmup_steps":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _refusal(f"{name}={value!r} is not a whole number of {self.unit} from {least}.")
        if self.warmup_fraction is not None:
            if self.warmup_steps:
                raise _refusal(
                    f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction} say the same thing"
                    " twice. Give one."
                )
            if not 0 <= self.warmup_fraction < 1:
                raise _refusal(
                    f"warmup_fraction={self.warmup_fraction} is a fraction of decay_steps: use 0 up to, not with, 1."
                )
        if self.decay_steps is not None and self.warmup_steps >= self.decay_steps:
            raise _refusal(
                f"warmup_steps={self.warmup_steps} is not below decay_steps={self.decay_steps}, which includes the"
                f" warm-up. Use decay_steps={self.warmup_steps + 1} or more."
            )

    def _check_rates(self) -> None:
        arguments = Arguments("LRSchedule")
        arguments.number(min_lr=self.min_lr, init_lr=self.init_lr)
        optional = ("warmup_fraction", "start_weight_decay", "end_weight_decay")
        arguments.number(optional=True, **{name: getattr(self, name) for name in optional})
        for name in ("min_lr", "init_lr"):
            if getattr(self, name) < 0:
                raise _refusal(f"{name}={getattr(self, name)} is negative. Use 0 or more.")
        if self.init_lr and not self.warmup_steps and not self.warmup_fraction:
            raise _refusal(
                f"init_lr={self.init_lr} is where the warm-up begins, and there is none. Give warmup_steps or"
                " warmup_fraction, or leave init_lr out."
            )

    def _check_weight_decay(self) -> None:
        start, end = self.start_weight_decay, self.end_weight_decay
        seen = f"start_weight_decay={start}, end_weight_decay={end}"
        if (start is None) != (end is None) or (self.raises_weight_decay and start is None):
            raise _refusal(f"{seen} with weight_decay_style={self.weight_decay_style!r}: give both start and end.")
        if start is not None and end is not None:
            if not self.raises_weight_decay and start != end:
                raise _refusal(
                    f"{seen} with weight_decay_style='constant', which goes nowhere. Use 'linear' or 'cosine', or leave"
                    " both out and set the optimizer's weight_decay."
                )
            if not 0 <= start <= end:
                raise _refusal(f"{seen}: Megatron raises the weight decay, from 0 or more. Use start <= end.")
        if self.weight_decay_steps is not None and not self.raises_weight_decay:
            raise _refusal(
                f"weight_decay_steps={self.weight_decay_steps} with weight_decay_style='constant', which goes nowhere."
                " Use 'linear' or 'cosine', or leave it out."
            )

    def _check_wsd(self) -> None:
        length = self.wsd_decay_steps
        if self.style != "WSD":
            if length is not None or self.wsd_decay_style is not None:
                raise _refusal(
                    f"wsd_decay_steps={length}, wsd_decay_style={self.wsd_decay_style!r} with style={self.style!r}:"
                    " they belong to style='WSD'. Leave them out, or use that."
                )
            return
        if length is None:
            raise _refusal("style='WSD' decays at its end only. Give wsd_decay_steps, the length of that decay.")
        if self.decay_steps is not None and self.warmup_steps + length > self.decay_steps:
            raise _refusal(
                f"warmup_steps={self.warmup_steps} and wsd_decay_steps={length} do not fit into"
                f" decay_steps={self.decay_steps}. Use decay_steps={self.warmup_steps + length} or more."
            )


class MegatronLRScheduler(LRScheduler):
    """A torch scheduler that asks megatron-core's ``OptimizerParamScheduler`` for its values.

    Its state is its place and the schedule, as of torch's schedulers: a state that is loaded brings its own. The length
    of the run, where the schedule ends with it, is the program's, and is asked for at the first step: asking in
    ``configure_optimizers`` would make Lightning load the data before a resumed loader has its state back, and lose it.

    Args:
        optimizer: Whose groups it sets.
        schedule: The values.
        trainer: See ``LRSchedule.build``.
        samples_per_step: See ``LRSchedule.build``.
    """

    def __init__(
        self, optimizer: Optimizer, schedule: LRSchedule, trainer: pl.Trainer | None, samples_per_step: int | None
    ) -> None:
        self.schedule = schedule
        self.num_steps = 0  # in the schedule's unit
        self._counted = 0  # torch's `last_epoch` up to which `num_steps` has counted
        self._trainer = trainer
        self._samples_per_step = samples_per_step
        self._max_lr = float(optimizer.defaults["lr"])
        self._horizon: int | None = None  # the run's length, where it is needed and known; after a load, the one before
        self._megatron: OptimizerParamScheduler | None = None
        self._check_rates(optimizer)
        self._begin()
        self._check_trainer()
        if self._sets_weight_decay:
            _keep_weight_decay_ratios(optimizer)
        super().__init__(optimizer)

    @override
    def get_lr(self) -> list[Any]:
        """The groups' learning rates; sets their weight decay, too, as torch's ``OneCycleLR`` sets momentum."""
        self._count()
        if self._megatron is None and self.num_steps:
            before, self._horizon = self._horizon, self._length_of_run()
            if before not in (None, self._horizon):
                rank_zero_warn(
                    f"LRSchedule(decay_steps=None) ends with the run: now at {self._horizon} {self.schedule.unit},"
                    f" before at {before}."
                )
            self._megatron = self.schedule.megatron_scheduler(self._max_lr, self._horizon)
        megatron = self._megatron or self._at_start
        megatron.num_steps = self.num_steps
        if self._sets_weight_decay:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = megatron.get_wd(group) * group["wd_mult"]
        return [
            megatron.get_lr({"max_lr": float(peak), "min_lr": self._min_lr(group, float(peak))})
            for group, peak in zip(self.optimizer.param_groups, self.base_lrs, strict=True)
        ]

    @override
    def state_dict(self) -> dict[str, Any]:
        """The place in the schedule, and the schedule."""
        names = ("last_epoch", "_step_count", "_last_lr", "num_steps", "_counted", "base_lrs")
        own = {"schedule": asdict(self.schedule), "max_lr": self._max_lr, "horizon": self._horizon}
        return {**{name: getattr(self, name) for name in names}, **own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the place and the schedule back; the length of the run stays the program's."""
        state = dict(state_dict)
        known = {each.name for each in fields(LRSchedule)}
        self.schedule = LRSchedule(**{name: value for name, value in state.pop("schedule").items() if name in known})
        peaks = [group["initial_lr"] for group in self.optimizer.param_groups]  # of states that do not tell
        was, self.base_lrs = self.base_lrs, state.pop("base_lrs", peaks)
        ratio = next((now / before for now, before in zip(self.base_lrs, was, strict=True) if before), 1.0)
        self._max_lr = state.pop("max_lr", self._max_lr * ratio)
        self._horizon = state.pop("horizon", None)
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        schedule = self.schedule
        self._at_start = schedule.megatron_scheduler(self._max_lr, schedule.decay_steps or _FAR)
        self._megatron = self._at_start if schedule.decay_steps or not schedule.needs_horizon else None

    @property
    def _sets_weight_decay(self) -> bool:
        return self.schedule.start_weight_decay is not None

    def _count(self) -> None:
        if self.last_epoch == 0:  # the start, also when a SequentialLR switches to this schedule
            self.num_steps = 0
        elif self.last_epoch != self._counted:
            self.num_steps = self._after(self.num_steps, self.last_epoch - self._counted)
        self._counted = self.last_epoch

    def _min_lr(self, group: dict[str, Any], peak: float) -> float:
        """The group's own floor (Megatron's key), or the schedule's in the ratio of the peaks."""
        floor = self.schedule.min_lr if peak == self._max_lr else self.schedule.min_lr * (peak / self._max_lr)
        return float(group.get("min_lr", floor))

    def _length_of_run(self) -> int:
        schedule, trainer = self.schedule, self._trainer
        assert trainer is not None
        # With `max_steps` the estimate is never asked for: it may have to load the data.
        steps = trainer.max_steps if trainer.max_steps != -1 else trainer.estimated_stepping_batches
        if steps in (-1, float("inf")):
            raise _endless()
        length = self._after(0, int(steps))
        least = schedule.warmup_steps + (schedule.wsd_decay_steps or 1)
        if length < least:
            rank_zero_warn(
                f"LRSchedule: the run of {length} {schedule.unit} ends before its warm-up and decay, which take"
                f" {least}."
            )
        return max(length, least)

    def _after(self, count: int, steps: int) -> int:
        """Where the schedule is after ``steps`` more optimizer steps, in its unit; batches may grow."""
        if self.schedule.unit == "steps":
            return count + steps
        if self._samples_per_step:
            return count + steps * self._samples_per_step
        trainer = self._trainer
        assert trainer is not None
        following = getattr(getattr(trainer.train_dataloader, "batch_sampler", None), "following", None)
        if following is None:
            return count + steps * _global_batch(trainer)
        for _ in range(steps * trainer.accumulate_grad_batches):
            count += following(count)
        return count

    def _check_rates(self, optimizer: Optimizer) -> None:
        schedule = self.schedule
        for group in [{"lr": self._max_lr}, *optimizer.param_groups]:
            peak = float(group.get("initial_lr", group["lr"]))
            if peak and not self._max_lr:
                raise _refusal(f"a group has lr={peak}, but the optimizer's own lr is 0: there is no ratio to keep.")
            if self._min_lr(group, peak) > peak or schedule.init_lr > peak:
                raise _refusal(
                    f"min_lr={schedule.min_lr} and init_lr={schedule.init_lr} must not be above the peak, which is the"
                    f" optimizer's lr={peak}. Lower them, or raise that."
                )

    def _check_trainer(self) -> None:
        schedule, trainer = self.schedule, self._trainer
        if self._megatron is None:
            if trainer is None:
                raise _refusal("decay_steps=None follows the Trainer's run. Give build(..., trainer), or decay_steps.")
            if trainer.max_steps == -1 and trainer.max_epochs == -1:
                raise _endless()
        if schedule.unit == "samples" and trainer is None and self._samples_per_step is None:
            raise _refusal("unit='samples' counts the global batch. Give build(..., trainer) or samples_per_step.")


def _keep_weight_decay_ratios(optimizer: Optimizer) -> None:
    """Give every group its ``wd_mult`` (Megatron's key): its weight decay over the optimizer's."""
    usual = optimizer.defaults.get("weight_decay")
    if usual is None:
        raise _refusal(f"{type(optimizer).__name__} has no weight decay to schedule.")
    for group in optimizer.param_groups:
        own = group["weight_decay"]
        if own and not usual and "wd_mult" not in group:
            raise _refusal(
                f"a group has weight_decay={own}, but the optimizer's own is 0: there is no ratio to keep. Give the"
                " optimizer a weight_decay, or the group its 'wd_mult'."
            )
        group.setdefault("wd_mult", own / usual if usual else 1.0)


def _global_batch(trainer: pl.Trainer) -> int:
    """Data-parallel size × the loader's batch size × accumulated batches."""
    loader = trainer.train_dataloader
    rows = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if rows is None:
        raise _refusal(
            f"unit='samples' needs the batch_size of the training loader, and {type(loader).__name__} has none. Give"
            " build(..., samples_per_step=)."
        )
    sampling = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1}
    return int(rows) * int(sampling["num_replicas"]) * int(trainer.accumulate_grad_batches)


def _refusal(text: str) -> ValueError:
    return ValueError(f"LRSchedule: {text}")


def _endless() -> MisconfigurationException:
    return MisconfigurationException(
        "LRSchedule(decay_steps=None) ends with the run, and this one has no end that is known: max_steps=-1, and"
        " no epochs of a known length. Give LRSchedule(decay_steps=) or Trainer(max_steps=)."
    )
