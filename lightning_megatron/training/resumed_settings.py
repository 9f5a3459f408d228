"""Decides, when a run resumes, whether settings of optimizer and schedulers are the checkpoint's or the program's.

A setting is what the program gives the optimizer and its schedulers at the start of a run, such as a peak learning
rate, a weight decay or a patience. What changes step by step is state, and always the checkpoint's. As in Lightning,
the checkpoint's settings hold by default. In either case a warning names the settings that differ, with both values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, LambdaLR, OneCycleLR

from lightning_megatron.training.lr_scheduler import MegatronLRScheduler
from lightning_megatron.training.optimizer import IMPLEMENTATION_FLAGS, ShardedOptimizer, set_values
from lightning_megatron.training.whole_optimizer import WholeOptimizer

Side = Literal["checkpoint", "program"]
State = dict[str, Any]
Difference = tuple[str, Any, Any]  # a setting's name, in the checkpoint, in the program

# Entries of a scheduler's state that change as it steps; everything else in its state is a setting.
_PROGRESS = {"last_epoch", "num_steps", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter", "horizon"}
# Entries that follow from other settings.
_DERIVED = {"lr", "initial_lr", "wd_mult", "base_lrs", "max_lr", "default_min_lr", "mode_worse", "_schedule_phases"}
# Settings that have only a private name (in SequentialLR and OneCycleLR of torch 2.13).
_PRIVATE = {"_milestones", "_anneal_func_type", "_schedule_phases"}
# Schedulers whose ``step(epoch)`` sets everything that follows from the step, such as momenta and the cycle.
_STEPPED_TO = (CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR)


class ResumedSettings:
    """Compares a checkpoint's settings with the program's, and applies those of one side.

    Args:
        side: The side whose settings apply: "checkpoint" or "program".
    """

    def __init__(self, side: Side) -> None:
        self._side = side
        self._to_set: list[Any] = []

    def choose(self, optimizer: ShardedOptimizer | WholeOptimizer, schedulers: list[Any], checkpoint: State) -> None:
        """Change the state to be loaded so that the settings of the chosen side apply, and warn of differences.

        Args:
            optimizer: The program's optimizer at the start of its run.
            schedulers: The program's schedulers.
            checkpoint: The state to be loaded; its ``optimizer_states`` and ``lr_schedulers`` are changed.
        """
        self._to_set = []
        saved = checkpoint["optimizer_states"][0]["hyper"]
        schedules: list[State] = checkpoint.get("lr_schedulers", [])
        optimizer.check_kind(saved)
        then = saved.get("given") or _guessed(saved["groups"], bool(schedules))
        found = list(_in_groups(then, optimizer.initial_settings))
        others = ""
        if len(schedules) != len(schedulers):
            others = f" The checkpoint has {len(schedules)} schedulers, and the program has {len(schedulers)}."
        if self._side == "program":
            _take_groups(saved, then, optimizer.initial_settings, scheduled=bool(schedules) and bool(schedulers))
        for number, (scheduler, state) in enumerate(zip(schedulers, schedules, strict=False)):
            own, name = scheduler.state_dict(), type(scheduler).__name__
            if _kind(own) != _kind(state):
                others += f" {name} is another kind of scheduler than the checkpoint's: it continues at the same step."
                peaks = None if self._side == "program" else [_peak(was) for was in then]
                schedules[number] = _placed(own, state, peaks)
                self._to_set.append(scheduler)
                continue
            changed = [(f"{name}'s {key}", was, now) for key, was, now in _in_states(state, own)]
            if self._side == "program":
                schedules[number] = _with_settings(state, own)
                if found or changed:
                    self._to_set.append(scheduler)
            found += changed
        self._tell(found, others)

    def set_rates(self) -> None:
        """Set the rates that changed schedules give at the place that was loaded, before the first step."""
        for scheduler in self._to_set if len(self._to_set) == 1 else []:
            if isinstance(scheduler, _STEPPED_TO):
                with warnings.catch_warnings():  # torch would rather have no place given
                    warnings.simplefilter("ignore")
                    scheduler.step(scheduler.last_epoch)
                continue
            rates = _rates(scheduler)
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=False):
                set_values(group, {"lr": rate})
            if rates:
                _set_last_rates(scheduler, rates)
        self._to_set = []

    def _tell(self, found: list[Difference], others: str) -> None:
        if not found and not others:
            return
        names = [f"{name}: {was} in the checkpoint, {now} in the program" for name, was, now in found]
        other = "program" if self._side == "checkpoint" else "checkpoint"
        hold = (
            f" The {self._side}'s hold; MegatronStrategy(checkpointing=Checkpointing(optimizer_settings={other!r}))"
            f" takes the {other}'s."
        )
        rank_zero_warn(
            "The optimizer's settings differ from the checkpoint's."
            + (f" {'; '.join(names)}.{hold}" if found else "")
            + others
        )


def _in_groups(then: list[State], now: list[State]) -> Iterator[Difference]:
    for number, (was, given) in enumerate(zip(then, now, strict=True)):
        of = f" of group {number}" if len(now) > 1 else ""
        if "lr" in given and _peak(was) != _peak(given):
            yield f"lr{of}", _peak(was), _peak(given)
        for key in given:
            if key in was and key not in _DERIVED and was[key] != given[key]:
                yield f"{key}{of}", was[key], given[key]


def _in_states(then: State, now: State) -> Iterator[Difference]:
    """Compare the settings of a scheduler, and of the schedulers and dictionaries within it."""
    for key, given in now.items():
        was = then.get(key)
        if key == "_schedulers":
            for number, (one, other) in enumerate(zip(then[key], given, strict=True)):
                yield from ((f"{name} of schedule {number}", a, b) for name, a, b in _in_states(one, other))
        elif key == "_schedule_phases" and was is not None:
            saved_ends, ends = ([phase["end_step"] for phase in phases] for phases in (was, given))
            if saved_ends != ends:
                yield "ends of phases", saved_ends, ends
        elif isinstance(given, dict) and isinstance(was, dict):
            if all(isinstance(name, str) for name in [*was, *given]):
                yield from _in_states(was, given)
            elif was != given:  # a Counter: MultiStepLR's milestones
                yield key, sorted(was), sorted(given)
        elif key in then and _is_setting(key) and key not in _DERIVED and was != given:
            yield key.removeprefix("_"), was, given


def _is_setting(key: str) -> bool:
    return key not in _PROGRESS and (not key.startswith("_") or key in _PRIVATE)


def _take_groups(saved: State, then: list[State], now: list[State], scheduled: bool) -> None:
    """Put the program's settings into saved groups; a scheduled learning rate keeps its ratio to the peak."""
    for group, was, given in zip(saved["groups"], then, now, strict=True):
        if given.get("amsgrad") and not group.get("amsgrad"):
            raise MisconfigurationException(
                "Checkpointing(optimizer_settings='program') with amsgrad=True: the checkpoint was trained without"
                " amsgrad, and has no maxima to continue from. Leave amsgrad out."
            )
        rate, before, peak = float(group["lr"]), _peak(was), _peak(given)
        for key, value in given.items():
            if key not in was or was[key] != value:
                group[key] = value
        group["lr"] = (rate if before == peak else rate * peak / before) if scheduled and before else given["lr"]
    saved["given"] = now


def _with_settings(saved: State, own: State) -> State:
    """A scheduler's saved step with the program's settings."""
    merged = {**saved, **{key: value for key, value in own.items() if _is_setting(key)}}
    if "_schedulers" in own:
        pairs = zip(saved["_schedulers"], own["_schedulers"], strict=True)
        merged["_schedulers"] = [_with_settings(*pair) for pair in pairs]
    return merged


def _placed(own: State, saved: State, peaks: list[float] | None) -> State:
    """A scheduler's own state at the step of a scheduler of another kind, with the given peaks or its own."""
    state: State = {**own, **{key: saved[key] for key in ("last_epoch", "_step_count") if key in saved}}
    if "_schedulers" in own:
        state["_schedulers"] = [_placed(each, saved, peaks) for each in own["_schedulers"]]
    if peaks is not None and "base_lrs" in own:
        state["base_lrs"] = peaks
        ratio = next((peak / before for peak, before in zip(peaks, own["base_lrs"], strict=True) if before), 1.0)
        if "max_lr" in own:
            state["max_lr"] = own["max_lr"] * ratio
    return state


def _kind(state: State) -> tuple[list[str], int]:
    """What distinguishes kinds of schedulers: Lightning's checkpoints do not store their class."""
    unlike = _DERIVED | {"horizon", "verbose"}
    names = sorted(key for key in state if not key.startswith("_") and key not in unlike)
    return names, len(state.get("_schedulers", ()))


def _rates(scheduler: Any) -> list[Any]:
    """The learning rates of a scheduler at its step, if it has a closed form."""
    if isinstance(scheduler, MegatronLRScheduler):
        return scheduler.get_lr()
    if isinstance(scheduler, LambdaLR):
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        return [base * factor(scheduler.last_epoch) for base, factor in pairs]
    closed_form = getattr(scheduler, "_get_closed_form_lr", None)  # private in torch (2.13)
    return [] if closed_form is None else list(closed_form())


def _set_last_rates(scheduler: Any, rates: list[Any]) -> None:
    """Have ``scheduler.get_last_lr()`` return ``rates``; private in torch (2.13)."""
    scheduler._last_lr = rates


def _guessed(groups: list[State], scheduled: bool) -> list[State]:
    """The settings of a checkpoint of this package's first versions, which did not store them."""
    moved = {"weight_decay", "betas", "momentum"} if scheduled else set()
    return [{key: value for key, value in group.items() if key not in moved | IMPLEMENTATION_FLAGS} for group in groups]


def _peak(settings: State) -> float:
    return float(settings["initial_lr"] if "initial_lr" in settings else settings["lr"])
