"""Megatron-LM's settings of recomputed activations, which are one argument of the strategy here."""

from __future__ import annotations

from typing import get_args

from lightning_megatron.cli.migrate.plan import Given, Plan, take
from lightning_megatron.cli.migrate.settings_table import CONFIG, STRATEGY
from lightning_megatron.models.recompute import OF_EXPERTS, RecomputedModule

_NAMES = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
_PLACE = f"{STRATEGY}.recompute"


def recomputation(given: Given, plan: Plan) -> None:
    """Carry over which activations are computed again: "selective", modules, a number of layers, or "full".

    Args:
        given: All settings, by Megatron's names, with their values read.
        plan: The run in the making.
    """
    granularity = given.get("recompute_granularity") or ("selective" if given.get("recompute_activations") else None)
    if given.get("recompute_activations") is not None:
        says = "MegatronStrategy(recompute=)"
        plan.say("recompute_activations", given["recompute_activations"], "carried over", says, _PLACE)
    if granularity is None:
        for name in _NAMES[1:]:
            if given.get(name) is not None:
                plan.say(name, given[name], "not needed", "nothing is recomputed without recompute_granularity")
        return
    value = _layers(given, plan) if granularity == "full" else _modules(given, plan)
    plan.put(_PLACE, value)
    take(given, plan, _NAMES, f"MegatronStrategy(recompute={value!r})", _PLACE)


def _layers(given: Given, plan: Plan) -> str | int:
    """A number of layers of each stage; "full" is every layer by itself."""
    number = given.get("recompute_num_layers")
    if given.get("recompute_method") == "block" and number is not None:
        return int(number)
    if number is not None and number > 1:  # several layers are recomputed at once, which is no argument here
        plan.put(f"{CONFIG}.extra.recompute_method", "uniform")
        plan.put(f"{CONFIG}.extra.recompute_num_layers", number)
    return "full"


def _modules(given: Given, plan: Plan) -> str | list[str]:
    """The modules of layers that are here; "selective" where none is named."""
    named = given.get("recompute_modules") or []
    ours = [OF_EXPERTS.get(name, name) for name in named]
    known = [name for name in dict.fromkeys(ours) if name in get_args(RecomputedModule)]
    for name, own in zip(named, ours, strict=True):
        if own not in known:
            plan.say(
                "recompute_modules", name, "not here", f"what is recomputed is {', '.join(get_args(RecomputedModule))}"
            )
    return known or "selective"
