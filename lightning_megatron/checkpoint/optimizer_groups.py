"""Restores an optimizer's groups under another layout: groups are identified by the weights in them.

Pipeline stages may have different groups: a group for each layer, for example, exists on the stage of its layer only.
So a checkpoint holds the groups of every stage with the whole model's names of their weights, and each rank of a
resumed run takes for its own groups the settings that their weights had.
"""

from __future__ import annotations

from typing import Any

from lightning_megatron.distributed import collectives

State = dict[str, Any]

KEY = "groups_of_stages"
# Lists in the states of optimizers and schedulers that have an entry for each group.
_OF_OPTIMIZER = ("groups", "given")
_OF_SCHEDULER = ("base_lrs", "_last_lr", "min_lrs")


def record(state: State, weights: list[list[str]]) -> list[State]:
    """Return the groups of every pipeline stage, or one entry if all stages have the same. All ranks call this.

    Args:
        state: Lightning's state, with ``optimizer_states`` and ``lr_schedulers``.
        weights: The names of the weights in each of this rank's groups.
    """
    optimizer = state["optimizer_states"][0]
    own = {key: optimizer[key] for key in _OF_OPTIMIZER}
    own["schedules"] = [_lists(schedule) for schedule in state.get("lr_schedulers", [])]
    stages = collectives.gather_from_stages({**own, "weights": weights})
    if all({**stage, "weights": None} == {**own, "weights": None} for stage in stages):
        together = zip(*(stage["weights"] for stage in stages), strict=True)
        return [{**own, "weights": [sorted({name for part in parts for name in part}) for parts in together]}]
    return stages


def regroup(state: State, weights: list[list[str]]) -> None:
    """Replace the saved groups, which are the first stage's, by those that this rank's weights were in.

    If the weights of a group come from groups with different settings, the saved groups are kept in their order.

    Args:
        state: The state that was read; its ``optimizer_states`` and ``lr_schedulers`` are changed.
        weights: The names of the weights in each of this rank's groups.
    """
    stages = state.pop(KEY, [])
    origins = {
        name: (stage, number)
        for stage, record in enumerate(stages)
        for number, names in enumerate(record["weights"])
        for name in names
    }
    chosen = [_choose(stages, origins, number, weights) for number in range(len(weights))]
    if not stages or None in chosen:
        return
    optimizer = state["optimizer_states"][0]
    for key in _OF_OPTIMIZER:
        optimizer[key] = [stages[stage][key][number] for stage, number in chosen]  # type: ignore[misc]
    for number, schedule in enumerate(state.get("lr_schedulers", [])):
        _set_lists(schedule, [record["schedules"][number] for record in stages], chosen)


def _choose(
    stages: list[State], origins: dict[str, tuple[int, int]], number: int, weights: list[list[str]]
) -> tuple[int, int] | None:
    """The stage and number of the saved group that group ``number`` of this rank continues; None if there is none."""
    found = sorted({origins[name] for name in weights[number] if name in origins})
    if not found:  # an empty group, or a group of new weights
        return next(((n, number) for n, record in enumerate(stages) if len(record["groups"]) == len(weights)), None)
    settings = [[stages[stage][key][group] for key in _OF_OPTIMIZER] for stage, group in found]
    return found[0] if all(each == settings[0] for each in settings) else None


def _lists(schedule: State) -> State:
    """The lists of a scheduler, and of the schedulers within it, that have an entry for each group."""
    own = {key: schedule[key] for key in _OF_SCHEDULER if isinstance(schedule.get(key), list)}
    return {**own, "_schedulers": [_lists(each) for each in schedule.get("_schedulers", [])]}


def _set_lists(schedule: State, of_stages: list[State], chosen: list[Any]) -> None:
    for key in of_stages[0]:
        if key != "_schedulers":
            schedule[key] = [of_stages[stage][key][number] for stage, number in chosen]
    if isinstance(schedule.get("lr_lambdas"), list) and len(schedule["lr_lambdas"]) != len(chosen):
        schedule["lr_lambdas"] = [None] * len(chosen)  # None keeps the program's function
    for number, each in enumerate(schedule.get("_schedulers", [])):
        _set_lists(each, [stage["_schedulers"][number] for stage in of_stages], chosen)
