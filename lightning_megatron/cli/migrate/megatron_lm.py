"""Reads Megatron-LM's command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_megatron.cli.migrate.carry_over import carry_over, destination_of, refuse, unknown
from lightning_megatron.cli.migrate.plan import MigrationError, Plan
from lightning_megatron.cli.migrate.settings_table import (
    CONFIG,
    DESTINATIONS,
    MODELS,
    SCHEDULE,
    Takes,
    name_of,
    option_of,
)
from lightning_megatron.training.lr_schedule import LRSchedule

# What Megatron-LM does where nothing is said, and Lightning or we would not.
_DEFAULTS: dict[str, Any] = {
    "clip_grad": 1.0,
    "lr_decay_style": "linear",
    "use_distributed_optimizer": False,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "norm_epsilon": 1e-5,
    "seed": 1234,
    "eval_iters": 100,
    "log_interval": 100,
    "calculate_per_token_loss": False,
}
_FIRST_LOSS_SCALE = 2.0**32
_ALIASES = {"persistent_save_interval": "save_interval"}
_DONE = ("carried over", "Lightning's")
_T5_DEFAULTS = {"position_embedding_type": "learned_absolute", "normalization": "LayerNorm"}


def from_command_line(
    arguments: str | Sequence[str], model: str = "gpt", *, devices: int = 8, num_nodes: int = 1
) -> Plan:
    """The run that does what these arguments make Megatron-LM do.

    Args:
        arguments: Megatron-LM's, such as ``--tensor-model-parallel-size 4 --bf16``: words, or a text as a shell reads
            it, with quotes, comments and lines that go on behind a backslash.
        model: Which of its scripts they are for: "gpt", "bert" or "t5".
        devices: GPUs of each machine.
        num_nodes: Number of machines.

    Raises:
        MigrationError: With a line for each argument that is unknown, and for each value that cannot be read.
        LayoutError: The parallel sizes do not divide the model or the batch.
    """
    if model not in MODELS:
        raise MigrationError(f"model={model!r}: use one of {', '.join(MODELS)}.")
    plan = Plan("Megatron-LM's command line", lambda name: option_of(name) if name in DESTINATIONS else name)
    plan.put("trainer.accelerator", "gpu")
    plan.put("trainer.devices", devices)
    plan.put("trainer.num_nodes", num_nodes)
    defaults = {**_DEFAULTS, **(_T5_DEFAULTS if model == "t5" else {})}
    said = _settings(_words(arguments))
    given = {**defaults, **said}
    _fill_in(given, devices * num_nodes)
    plan.say(
        "devices", None, "yours to do", f"{num_nodes} machines of {devices} GPUs; --devices and --num-nodes say it"
    )
    carry_over(given, plan, model, devices * num_nodes)
    _shape_of_the_script(given, plan, model)
    LRSchedule(**plan.get(SCHEDULE, {}))  # refuses what contradicts itself
    for index, line in enumerate(plan.lines):
        if line.value is True:
            plan.lines[index] = replace(line, value=None)
        elif line.setting[:2] == "--" and line.fate in _DONE and name_of(line.setting) not in said:
            plan.lines[index] = replace(line, says=f"{line.says} (Megatron-LM's default)")
    return plan


def _words(arguments: str | Sequence[str]) -> list[str]:
    if not isinstance(arguments, str):
        return list(arguments)
    try:
        return shlex.split(arguments.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise MigrationError(f"The arguments cannot be read as a shell does: {error}.") from None


def _fill_in(given: dict[str, Any], world_size: int) -> None:
    """Fill in what Megatron-LM derives from other settings when a setting is not given."""
    tp, pp, cp = (given.get(f"{name}_parallel_size", 1) for name in ("tensor_model", "pipeline_model", "context"))
    if tp * pp * cp > world_size:
        raise MigrationError(
            f"tensor {tp} × pipeline {pp} × context {cp} are {tp * pp * cp} ranks, more than the {world_size} of"
            " --devices × --num-nodes. Say how many machines there are: --num-nodes."
        )
    if given.get("global_batch_size") is None and not given.get("step_batch_size_schedule"):
        replicas, left = divmod(world_size, tp * pp * cp)
        if given.get("micro_batch_size") is not None and not left:
            given["global_batch_size"] = given["micro_batch_size"] * replicas
    if given.get("fp16"):
        given.setdefault("initial_loss_scale", _FIRST_LOSS_SCALE)


def _shape_of_the_script(given: dict[str, Any], plan: Plan, model: str) -> None:
    """Settings that all models of a Megatron-LM script have."""
    if model == "bert":
        plan.put(f"{CONFIG}.norm_placement", "pre")
        plan.say("norm_placement", None, "carried over", "Megatron-LM's BERT has its norms before the blocks")
    if given.get("eval_interval") is None and not given.get("full_validation"):
        plan.put("trainer.limit_val_batches", 0)
        says = "Trainer(limit_val_batches=0): without it Megatron-LM does not evaluate while it trains"
        plan.say("eval_interval", None, "Lightning's", says)
    if model == "t5" and not given.get("disable_bias_linear"):
        for name in ("add_bias_linear", "add_qkv_bias"):
            plan.put(f"{CONFIG}.extra.{name}", True)
        plan.say("biases", None, "carried over", "config.extra: Megatron-LM's T5 has biases in its linear layers")
        says = "Megatron-LM's T5 adds a bias, zero at first, to the scores of tokens; here they have none"
        plan.say("bias of the output", None, "yours to do", says)
    if plan.get(f"{CONFIG}.activation") is None:
        fused = not given.get("no_bias_gelu_fusion") and not given.get("disable_bias_linear")
        plan.put(f"{CONFIG}.activation", "gelu_tanh" if fused else "gelu")
        says = "gelu_tanh, which is what its fused kernel computes" if fused else "gelu"
        plan.say("activation", None, "carried over", f"config.activation: {says}")


def _settings(arguments: Sequence[str]) -> dict[str, Any]:
    """What the options ask for, by Megatron's names, as argparse reads them: of one that is given twice the last holds.

    Raises:
        MigrationError: With a line for each option that is unknown, or whose value cannot be read.
    """
    given: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            given.append((name_of(option), [value] if equals else []))
        elif not given:
            raise MigrationError(f"{word!r}: start with an option, such as --num-layers 24.")
        else:
            given[-1][1].append(word)
    found: dict[str, Any] = {}
    wrong = []
    for name, values in given:
        destination = destination_of(name)
        try:
            if destination is None:
                raise MigrationError(unknown(name, option_of))
            option = option_of(name)
            found[_ALIASES.get(name, name)] = destination.read(option, _value(option, destination.form, values))
        except MigrationError as error:
            wrong.append(str(error))
    refuse(list(dict.fromkeys(wrong)))
    return found


def _value(option: str, takes: Takes, values: list[str]) -> Any:
    if takes in ("flag", "switch") and not values:
        return True
    if takes == "flag":
        raise MigrationError(f"{option} {' '.join(values)}: it takes no value; leave it out.")
    if not values:
        raise MigrationError(f"{option} is without its value.")
    if takes == "list":
        return values
    if len(values) > 1:
        raise MigrationError(f"{option} {' '.join(values)}: it takes one value. Put quotes around words that are one.")
    return values[0]
