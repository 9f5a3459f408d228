"""Carries settings over, from Megatron's names and values to a run of ``lightning-megatron fit``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from lightning_megatron.cli.migrate.batch_settings import growth
from lightning_megatron.cli.migrate.combined_settings import carry_over_combined
from lightning_megatron.cli.migrate.plan import MigrationError, Plan, nearest
from lightning_megatron.cli.migrate.settings_table import (
    CONFIG,
    DATA,
    DESTINATIONS,
    MODELS,
    MODULE,
    STRATEGY,
    Destination,
    extra,
    option_of,
)
from lightning_megatron.cli.migrate.values import anything, truth
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.distributed.signatures import named_arguments_of
from lightning_megatron.models.bert.config import BertConfig
from lightning_megatron.models.core_fields import core_fields
from lightning_megatron.models.gpt.config import GPTConfig
from lightning_megatron.models.gpt.experts.config import Experts
from lightning_megatron.models.model_config import ModelConfig
from lightning_megatron.models.t5.config import T5Config

_FAMILIES: dict[str, type[ModelConfig]] = {"gpt": GPTConfig, "bert": BertConfig, "t5": T5Config}
# What each BERT and T5 is, whatever is said.
_FIXED: dict[str, dict[str, Any]] = {
    "gpt": {},
    "bert": {"normalization": "LayerNorm", "tie_embeddings": True, "rotary_percent": 1.0},
    "t5": {"bias": False, "rotary_base": 10000.0, "rotary_percent": 1.0},
}
# Settings of one kind of model, which the others do not read.
_OF_ONE = {"task": "BERT", "num_labels": "BERT"}
_OF_ONE |= dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), "relative positions")


def destination_of(name: str) -> Destination | None:
    """Return the place of a setting; None if this command knows no setting of Megatron of this name.

    Args:
        name: Megatron's.
    """
    if name in DESTINATIONS:
        return DESTINATIONS[name]
    if name in core_fields():
        return extra(name, truth if core_fields()[name] else anything)
    return None


def unknown(name: str, called: Callable[[str], str]) -> str:
    """What to say of a setting that nobody knows, with the nearest that there is."""
    near = nearest(name, [*DESTINATIONS, *core_fields()])
    return f"{called(name)}: this command knows no setting of Megatron of this name.{near}"


def read(settings: Mapping[str, Any], called: Callable[[str], str]) -> dict[str, Any]:
    """The settings with their values read; those that are None are left out.

    Args:
        settings: The settings, by Megatron's names.
        called: Returns the name of a setting for an error, from Megatron's name.

    Raises:
        MigrationError: A setting is unknown or cannot be read; the message has a line for each.
    """
    found, wrong = {}, []
    for name, value in settings.items():
        destination = destination_of(name)
        try:
            if destination is None:
                raise MigrationError(unknown(name, called))
            if value is not None:
                found[name] = destination.read(called(name), value)
        except MigrationError as error:
            wrong.append(str(error))
    refuse(wrong)
    return found


def refuse(wrong: Sequence[str]) -> None:
    """Raise one error that has a line for each thing that is wrong.

    Raises:
        MigrationError: Something is wrong.
    """
    if wrong:
        raise MigrationError("\n".join(wrong))


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
        destination = destination_of(name)
        assert destination is not None, name
        if destination.place is not None:
            plan.put(destination.place, destination.at(value))
            plan.say(name, value, destination.fate, destination.says, destination.place)
        elif destination.fate in ("not here", "yours to do") and destination.asks_for_nothing(value):
            plan.say(name, value, "not needed", "so it is where nothing is said")
        elif destination.fate != "carried over":
            plan.say(name, value, destination.fate, destination.says)
    carry_over_combined(given, plan)
    if model in MODELS:
        _fit_the_family(plan, str(model))
    else:
        _move_module_arguments(plan)
    _check_layout(given, plan, world_size)


def _fit_the_family(plan: Plan, model: str) -> None:
    """Take back what the model's configuration does not have, and say what else it will refuse."""
    family = _FAMILIES[model]
    config: dict[str, Any] = plan.get(CONFIG, {})
    known = {field.name for field in fields(family)}
    known -= {name for name, owner in _OF_ONE.items() if owner == "BERT" and model != "bert"}  # ours has others
    for name in [name for name in config if name not in known]:
        value = config[name]
        if name in _OF_ONE:
            plan.take_back(f"{CONFIG}.{name}", "not needed", f"of {_OF_ONE[name]} alone")
        elif name in _FIXED[model] and value == _FIXED[model][name]:
            plan.take_back(f"{CONFIG}.{name}", "not needed", f"so it is in every {family.__name__}")
        else:
            plan.take_back(f"{CONFIG}.{name}", "not here", f"{family.__name__} has no {name}")
    if model != "gpt" and config.get("layers", "torch") != "torch":
        says = f"{family.__name__}'s layers are PyTorch's, with the same numbers"
        plan.take_back(f"{CONFIG}.layers", "not needed", says)
    if model == "t5" and config.get("position_embedding", "learned") == "learned":
        for name in ("relative_attention_num_buckets", "relative_attention_max_distance"):
            plan.take_back(f"{CONFIG}.{name}", "not needed", f"of {_OF_ONE[name]} alone")
    needed = [field.name for field in fields(family) if field.default is MISSING and field.default_factory is MISSING]
    absent = [name for name in needed if name not in config]
    for name in absent:
        plan.say(name, None, "yours to do", f"config.{name} must be given: {option_of(name)}")
    if not absent:
        try:
            experts = {"experts": Experts(**config["experts"])} if "experts" in config else {}
            family(**{**config, **experts})
        except ValueError as error:
            plan.say("config", None, "yours to do", str(error))


def _move_module_arguments(plan: Plan) -> None:
    """``from_pretrained`` hands them on; the command line reads what a signature does not name from ``dict_kwargs``."""
    named = named_arguments_of("lightning_megatron.AutoModule", "from_pretrained")
    arguments = plan.get(MODULE, {})
    for name in [name for name in arguments if name not in named]:
        plan.put(f"model.dict_kwargs.{name}", arguments.pop(name))


def _check_layout(given: Mapping[str, Any], plan: Plan, world_size: int | None) -> None:
    """Refuse sizes that do not divide."""
    if world_size is None:
        return
    sizes = {name: plan.get(f"{STRATEGY}.{name}") or 1 for name in ("tp", "pp", "cp", "ep")}
    split = plan.get(f"{STRATEGY}.pipeline_split_rank")
    layout = ParallelLayout(
        world_size=world_size,
        **sizes,
        vp=plan.get(f"{STRATEGY}.vp"),
        etp=plan.get(f"{STRATEGY}.etp"),
        sequence_parallel=plan.get(f"{STRATEGY}.sequence_parallel", False),
        pipeline_split_rank=split,
        layers_per_stage=plan.get(f"{STRATEGY}.layers_per_stage"),
    )
    whole, part = plan.get(f"{DATA}.global_batch_size"), plan.get(f"{STRATEGY}.micro_batch_size")
    if whole is not None and whole % layout.dp:
        raise MigrationError(
            f"global_batch_size={whole}: {layout.dp} data-parallel replicas do not share it evenly. Use a multiple."
        )
    rule = growth(given)
    if rule is not None and whole is not None:
        rule.check(whole, layout.dp)
    if whole is not None and part is not None:
        layout.check_batch(whole // layout.dp, part)
