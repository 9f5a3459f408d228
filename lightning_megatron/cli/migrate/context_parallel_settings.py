"""Megatron-LM's settings of how attention reaches the tokens of other context-parallel ranks; an argument here."""

from __future__ import annotations

from typing import get_args

from lightning_megatron.cli.migrate.plan import Given, Plan
from lightning_megatron.cli.migrate.settings_table import STRATEGY
from lightning_megatron.distributed.layout import ContextComm
from lightning_megatron.distributed.other_names import VALUE_NAMES

_PLACE = f"{STRATEGY}.cp_comm"
_WAYS = {**VALUE_NAMES["cp_comm"], **{way: way for way in get_args(ContextComm)}}  # by Megatron-LM's names


def attention_over_ranks(given: Given, plan: Plan) -> None:
    """Carry over ``--cp-comm-type``, which Megatron-LM may say of each layer, and which all layers share here.

    Args:
        given: All settings, by Megatron's names, with their values read.
        plan: The run in the making, with its ``cp``.
    """
    named = given.get("cp_comm_type")
    if not named:
        return
    value = " ".join(named)
    if (plan.get(f"{STRATEGY}.cp") or 1) == 1:
        plan.say("cp_comm_type", value, "not needed", "no sequence is divided without context_parallel_size")
        return
    ways = {_WAYS.get(name) for name in named}
    way = ways.pop()
    if ways or way is None:
        says = (
            f"layers share one of {', '.join(get_args(ContextComm))}; without cp_comm the best for the shape is taken"
        )
        plan.say("cp_comm_type", value, "not here", says)
        return
    plan.put(_PLACE, way)
    plan.say("cp_comm_type", value, "carried over", f"MegatronStrategy(cp_comm={way!r})", _PLACE)
