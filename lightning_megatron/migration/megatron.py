"""Megatron's names and values made into a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import signature
from typing import Any

from megatron.core.transformer import TransformerConfig

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.migration.compounds import MODELS, settle
from lightning_megatron.migration.homes import DATA, HOMES, MODULE, STRATEGY, Home, extra
from lightning_megatron.migration.plan import MigrationError, Plan, nearest
from lightning_megatron.modules import AutoModule

_EXTRA = {field.name for field in fields(TransformerConfig)}
_WAITING = {"cp": "context parallelism", "ep": "expert parallelism", "etp": "expert tensor parallelism"}


def home_of(name: str, where: str) -> Home:
    """Where a setting lives.

    Args:
        name: Megatron's.
        where: It was found, for the error.

    Raises:
        MigrationError: Megatron has none of this name that this command knows.
    """
    if name in HOMES:
        return HOMES[name]
    if name in _EXTRA:
        return extra(name)
    near = nearest(name, [*HOMES, *_EXTRA])
    raise MigrationError(f"{where}: this command knows no setting of Megatron of this name.{near}")


def read(settings: Mapping[str, Any], called: Callable[[str], str]) -> dict[str, Any]:
    """The settings with their values read; those that are None are left out.

    Args:
        settings: By Megatron's names.
        called: How an error names a setting.
    """
    return {
        name: home_of(name, called(name)).read(called(name), value)
        for name, value in settings.items()
        if value is not None
    }


def carry_over(given: Mapping[str, Any], plan: Plan, model: str | None = None, world_size: int | None = None) -> None:
    """Put each setting where it lives, and say so.

    Args:
        given: Settings by Megatron's names, with their values read.
        plan: Takes them.
        model: "gpt", "bert" or "t5", or transformers' directory or name of a model; None where nobody knows.
        world_size: Ranks, where they are known: the layout is checked.
    """
    plan.put("trainer.strategy.class_path", "lightning_megatron.MegatronStrategy")
    plan.put(STRATEGY, {})
    if model in MODELS:
        plan.put("model.class_path", f"lightning_megatron.{MODELS[model][0]}")
        if model == "bert":
            plan.put("model.init_args.config.task", "pretraining")
    else:
        plan.put("model.class_path", "lightning_megatron.AutoModule.from_pretrained")
        plan.put("model.init_args.source", model or "YOUR-MODEL")
    for name, value in given.items():
        home = home_of(name, name)
        if home.place is not None:
            plan.put(home.place, home.at(value))
        if home.place is not None or home.fate != "carried over":
            on = not (home.flag and value is False)
            plan.say(name, value, home.fate if on or home.place else "not needed", home.says)
    settle(given, plan)
    if model not in MODELS:
        _move_what_the_adapter_takes(plan)
    _check_layout(plan, world_size)


def _move_what_the_adapter_takes(plan: Plan) -> None:
    """``from_pretrained`` hands them on; the command line reads what a signature does not name from ``dict_kwargs``."""
    named = signature(AutoModule.from_pretrained).parameters
    arguments = plan.get(MODULE, {})
    for name in [name for name in arguments if name not in named]:
        plan.put(f"model.dict_kwargs.{name}", arguments.pop(name))


def _check_layout(plan: Plan, world_size: int | None) -> None:
    """Refuse sizes that do not divide, and name dimensions that wait."""
    sizes = {name: plan.get(f"{STRATEGY}.{name}") or 1 for name in ("tp", "pp", "cp", "ep", "etp")}
    for name, what in _WAITING.items():
        if sizes[name] > 1:
            plan.say(name, sizes[name], "not here", f"{what} waits for its layers; the strategy refuses it")
    if world_size is None or any(sizes[name] > 1 for name in _WAITING):
        return
    split = plan.get(f"{STRATEGY}.pipeline_split_rank")
    layout = ParallelLayout(
        world_size=world_size,
        tp=sizes["tp"],
        pp=sizes["pp"],
        vp=plan.get(f"{STRATEGY}.vp"),
        sequence_parallel=plan.get(f"{STRATEGY}.sequence_parallel", False),
        pipeline_split_rank=split,
    )
    whole, part = plan.get(f"{DATA}.global_batch_size"), plan.get(f"{STRATEGY}.micro_batch_size")
    if whole is not None and whole % layout.dp:
        raise MigrationError(
            f"global_batch_size={whole}: {layout.dp} data-parallel replicas do not share it evenly. Use a multiple."
        )
    if whole is not None and part is not None:
        layout.check_batch(whole // layout.dp, part)
