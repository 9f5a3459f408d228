"""``MegatronLRScheduler``: the torch scheduler that sets what an ``LRSchedule`` says at each optimizer step."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, ClassVar, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

# A horizon for what does not depend on one: a constant schedule, and every schedule at its start.
_FAR = 2**53


class _Schedule(Protocol):
    """What the scheduler reads of an ``LRSchedule``, which is defined above this file."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def unit(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay_steps(self) -> int | None: ...
    @property
    def wsd_decay_steps(self) -> int | None: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def init_lr(self) -> float: ...
    @property
    def start_weight_decay(self) -> float | None: ...
    @property
    def needs_horizon(self) -> bool: ...
    def megatron_scheduler(self, max_lr: float, decay_steps: int) -> OptimizerParamScheduler: ...


class MegatronLRScheduler(LRScheduler):
    """A torch scheduler that asks megatron-core's ``OptimizerParamScheduler`` for its values.

    Its state is its step and the schedule, as with torch's schedulers: loading a state brings back the schedule it was
    saved with. The length of the run, where the schedule ends with it, is always that of the present run. It is asked
    for at the first step: asking in ``configure_optimizers`` would make Lightning load the data before a resumed loader
    has its state back, and lose that state.

    Args:
        optimizer: The optimizer whose groups it sets.
        schedule: The ``LRSchedule``.
        trainer: The Trainer that knows the length of the run; see ``LRSchedule.build``.
        samples_per_step: Samples of the global batch; see ``LRSchedule.build``.
    """

    def __init__(
        self, optimizer: Optimizer, schedule: _Schedule, trainer: pl.Trainer | None, samples_per_step: int | None
    ) -> None:
        self.schedule = schedule
        self.num_steps = 0  # in the schedule's unit
        self._counted = 0  # torch's `last_epoch` up to which `num_steps` has counted
        self._trainer = trainer
        self._samples_per_step = samples_per_step
        self._max_lr = float(optimizer.defaults["lr"])
        self._horizon: int | None = None  # the run's length, once known; after a load, that of the saved run
        self._megatron: OptimizerParamScheduler | None = None
        self._check_rates(optimizer)
        self._start()
        self._check_trainer()
        if self._sets_weight_decay:
            _keep_weight_decay_ratios(optimizer)
        super().__init__(optimizer)

    @override
    def get_lr(self) -> list[Any]:
        """Return the groups' learning rates, and set their weight decay, as torch's ``OneCycleLR`` sets momentum."""
        self._count()
        if self._megatron is None and self.num_steps:
            before, self._horizon = self._horizon, self._length_of_run()
            if before not in (None, self._horizon):
                rank_zero_warn(
                    f"LRSchedule(decay_steps=None) ends with the run: at {self._horizon} {self.schedule.unit} now, and"
                    f" at {before} when the checkpoint was saved."
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
        """Return the step, and the schedule."""
        names = ("last_epoch", "_step_count", "_last_lr", "num_steps", "_counted", "base_lrs")
        own = {"schedule": asdict(self.schedule), "max_lr": self._max_lr, "horizon": self._horizon}
        return {**{name: getattr(self, name) for name in names}, **own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the saved step and schedule; the length of the run stays that of the present run."""
        state = dict(state_dict)
        known = {each.name for each in fields(self.schedule)}
        saved = {name: value for name, value in state.pop("schedule").items() if name in known}
        self.schedule = type(self.schedule)(**saved)
        peaks = [group["initial_lr"] for group in self.optimizer.param_groups]  # for states without base_lrs
        was, self.base_lrs = self.base_lrs, state.pop("base_lrs", peaks)
        ratio = next((now / before for now, before in zip(self.base_lrs, was, strict=True) if before), 1.0)
        self._max_lr = state.pop("max_lr", self._max_lr * ratio)
        self._horizon = state.pop("horizon", None)
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
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
        """The group's own ``min_lr`` (Megatron's key), or the schedule's, scaled as the group's peak is."""
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
        """Return the place of the schedule after ``steps`` more optimizer steps, in its unit; batches may grow."""
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
                raise _refusal(
                    f"a group has lr={peak}, but the optimizer's own lr is 0, so the group's rate cannot keep its ratio"
                    " to it. Give the optimizer an lr above 0."
                )
            if self._min_lr(group, peak) > peak or schedule.init_lr > peak:
                raise _refusal(
                    f"min_lr={schedule.min_lr} and init_lr={schedule.init_lr} must not be above the peak, which is the"
                    f" optimizer's lr={peak}. Lower them, or raise lr."
                )

    def _check_trainer(self) -> None:
        schedule, trainer = self.schedule, self._trainer
        if self._megatron is None:
            if trainer is None:
                raise _refusal(
                    "decay_steps=None takes the length of the Trainer's run. Use build(optimizer, trainer), or give"
                    " decay_steps."
                )
            if trainer.max_steps == -1 and trainer.max_epochs == -1:
                raise _endless()
        if schedule.unit == "samples" and trainer is None and self._samples_per_step is None:
            raise _refusal(
                "unit='samples' counts the global batch. Use build(optimizer, trainer) or build(optimizer,"
                " samples_per_step=...)."
            )


def _keep_weight_decay_ratios(optimizer: Optimizer) -> None:
    """Give every group its ``wd_mult`` (Megatron's key): its weight decay divided by the optimizer's."""
    usual = optimizer.defaults.get("weight_decay")
    if usual is None:
        raise _refusal(f"{type(optimizer).__name__} has no weight decay to schedule.")
    for group in optimizer.param_groups:
        own = group["weight_decay"]
        if own and not usual and "wd_mult" not in group:
            raise _refusal(
                f"a group has weight_decay={own}, but the optimizer's own is 0, so the group's weight decay cannot keep"
                " its ratio to it. Give the optimizer a weight_decay, or the group its 'wd_mult'."
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
        "LRSchedule(decay_steps=None) ends with the run, but the length of this run is not known: max_steps=-1, and"
        " no epochs of a known length. Give LRSchedule(decay_steps=) or Trainer(max_steps=)."
    )
