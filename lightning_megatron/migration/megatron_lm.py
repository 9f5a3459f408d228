"""Megatron-LM's command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_megatron.migration.compounds import MODELS
from lightning_megatron.migration.homes import CONFIG, HOMES
from lightning_megatron.migration.megatron import carry_over, home_of, read
from lightning_megatron.migration.plan import MigrationError, Plan

# What Megatron-LM does where nothing is said, and Lightning or we would not.
_DEFAULTS: dict[str, Any] = {
    "clip_grad": 1.0,
    "lr_decay_style": "linear",
    "use_distributed_optimizer": False,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "norm_epsilon": 1e-5,
    "seed": 1234,
    "eval_interval": 1000,
    "eval_iters": 100,
}
_T5_DEFAULTS = {"position_embedding_type": "learned_absolute", "normalization": "LayerNorm"}


def from_command_line(arguments: Sequence[str], model: str = "gpt", *, devices: int = 8, num_nodes: int = 1) -> Plan:
    """The run that does what these arguments make Megatron-LM do.

    Args:
        arguments: As on the command line, ``--tensor-model-parallel-size 4 --bf16``.
        model: Which of its scripts they are for: "gpt", "bert" or "t5".
        devices: Of a machine.
        num_nodes: Machines.

    Raises:
        MigrationError: An argument that is unknown, or a value that cannot be read.
        LayoutError: Sizes that do not divide.
    """
    if model not in MODELS:
        raise MigrationError(f"model={model!r}: use one of {', '.join(MODELS)}.")
    plan = Plan("Megatron-LM's command line", lambda name: _option(name) if name in HOMES else name)
    plan.put("trainer.accelerator", "gpu")
    plan.put("trainer.devices", devices)
    plan.put("trainer.num_nodes", num_nodes)
    defaults = {**_DEFAULTS, **(_T5_DEFAULTS if model == "t5" else {})}
    given = {**defaults, **read(_settings(arguments), _option)}
    plan.say(
        "devices", None, "yours to do", f"{num_nodes} machines of {devices} GPUs; --devices and --num-nodes say it"
    )
    carry_over(given, plan, model, devices * num_nodes)
    _shape_of_the_script(given, plan, model)
    said = {option for option in arguments if option.startswith("--")}
    for index, line in enumerate(plan.lines):
        if line.value is True:
            plan.lines[index] = replace(line, value=None)
        elif line.setting.startswith("--") and not any(option.startswith(line.setting) for option in said):
            plan.lines[index] = replace(line, says=f"{line.says} (Megatron-LM's default)")
    return plan


def _shape_of_the_script(given: dict[str, Any], plan: Plan, model: str) -> None:
    """What its models are without being told."""
    if model == "bert":
        plan.put(f"{CONFIG}.norm_placement", "pre")
        plan.say("norm_placement", None, "carried over", "Megatron-LM's BERT has its norms before the blocks")
    if plan.get(f"{CONFIG}.activation") is None:
        fused = not given.get("no_bias_gelu_fusion") and not given.get("disable_bias_linear")
        plan.put(f"{CONFIG}.activation", "gelu_tanh" if fused else "gelu")
        says = "gelu_tanh, which is what its fused kernel computes" if fused else "gelu"
        plan.say("activation", None, "carried over", f"config.activation: {says}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Options and their values; their names with underscores."""
    found: dict[str, list[str]] = {}
    for word in arguments:
        if word.startswith("--"):
            option, equals, value = word[2:].partition("=")
            name = option.replace("-", "_")
            found[name] = [value] if equals else []
        elif not found:
            raise MigrationError(f"{word!r}: start with an option, such as --num-layers 24.")
        else:
            found[list(found)[-1]].append(word)
    return {name: _value(name, values) for name, values in found.items()}


def _value(name: str, values: list[str]) -> Any:
    option = _option(name)
    home = home_of(name, option)
    if home.flag:
        if values:
            raise MigrationError(f"{option} {' '.join(values)}: it takes no value; leave it out.")
        return True
    if not values:
        raise MigrationError(f"{option} is without its value.")
    return values if len(values) > 1 else values[0]
