"""Megatron-LM's settings of the optimizer and of its learning-rate schedule."""

from __future__ import annotations

from typing import Any

from lightning_megatron.cli.migrate.batch_settings import full_batch, growth
from lightning_megatron.cli.migrate.plan import Given, MigrationError, Plan, take
from lightning_megatron.cli.migrate.settings_table import MODULE, SCHEDULE
from lightning_megatron.training.moment_types import LARGEST_BETA_IN_BF16

# Megatron-LM's defaults, where they are not ours.
_DEFAULTS = {"weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "sgd_momentum": 0.9}
# What ``LRSchedule`` calls the settings of Megatron's schedule: those of lengths end in _iters or _samples.
_SCHEDULE = {
    "lr_decay_style": "style", "min_lr": "min_lr", "lr_warmup_init": "init_lr",
    "lr_warmup_fraction": "warmup_fraction", "weight_decay_incr_style": "weight_decay_style",
    "start_weight_decay": "start_weight_decay", "end_weight_decay": "end_weight_decay",
    "lr_wsd_decay_style": "wsd_decay_style",
}  # fmt: skip
_LENGTHS = {"lr_warmup": "warmup_steps", "lr_decay": "decay_steps", "lr_wsd_decay": "wsd_decay_steps"}


def optimizer(given: Given, plan: Plan) -> None:
    """Carry over the optimizer and what weights it decays."""
    kind = given.get("optimizer")
    names = ("optimizer", "lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum")
    moments = _moments(given, plan)
    if not moments and not any(given.get(name) is not None for name in names):
        return
    take(given, plan, names[1:], "the torch optimizer in model.init_args.optimizer")
    if kind in ("adam", "sgd"):
        plan.say("optimizer", kind, "carried over", "the torch optimizer in model.init_args.optimizer")
    elif kind == "muon":
        says = "lightning_megatron.Muon, with distributed_optimizer=False; the run has AdamW"
        plan.say("optimizer", kind, "yours to do", says)
    elif kind is not None:
        says = "model.init_args.optimizer takes elementwise torch optimizers; the run has AdamW"
        plan.say("optimizer", kind, "not here", says)
    known = {**_DEFAULTS, **{name: given[name] for name in names if given.get(name) is not None}}
    decay = {"weight_decay": known["weight_decay"]}
    rate = {"lr": known["lr"]} if "lr" in known else {"lr": 1e-3}
    if "lr" not in known:
        plan.say("lr", None, "yours to do", "the optimizer's learning rate is 0.001 until you say another")
    if kind == "sgd":
        made = {"class_path": "torch.optim.SGD", "init_args": {**rate, **decay, "momentum": known["sgd_momentum"]}}
    else:
        betas = {"betas": [known["adam_beta1"], known["adam_beta2"]], "eps": known["adam_eps"]}
        path = "lightning_megatron.LeanAdamW" if moments else "torch.optim.AdamW"
        made = {"class_path": path, "init_args": {**rate, **decay, **betas, **moments}}
    groups = {"optimizer": made, "no_weight_decay": "lightning_megatron.biases_and_vectors"}
    plan.put(f"{MODULE}.optimizer", {"class_path": "lightning_megatron.ParameterGroups", "init_args": groups})
    plan.say("no weight decay", None, "carried over", "Megatron's rule, biases and vectors: ParameterGroups")


def _moments(given: Given, plan: Plan) -> dict[str, Any]:
    """The arguments of ``LeanAdamW`` that say what type Adam's moments have, and where they are; none are torch's."""
    moments: dict[str, Any] = {}
    if given.get("optimizer_cpu_offload"):
        moments["on_host"] = True
        plan.say("optimizer_cpu_offload", True, "carried over", "LeanAdamW(on_host=True)")
    elif given.get("optimizer_cpu_offload") is not None:
        plan.say("optimizer_cpu_offload", False, "not needed", "so it is where nothing is said")
    known = {**_DEFAULTS, **{name: value for name, value in given.items() if value is not None}}
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        value = given.get(name)
        if value == "bf16" and (name == "exp_avg_dtype" or known["adam_beta2"] <= LARGEST_BETA_IN_BF16):
            moments[name] = "bfloat16"
            plan.say(name, value, "carried over", f"LeanAdamW({name}='bfloat16')")
        elif value == "bf16":
            says = f"its average stands still in bf16 with adam_beta2 above {LARGEST_BETA_IN_BF16}; it is fp32"
            plan.say(name, value, "not here", says)
        elif value == "fp32":
            plan.say(name, value, "not needed", "so it is where nothing is said")
        elif value is not None:
            plan.say(name, value, "not here", "LeanAdamW's moments are fp32 or bf16; it is fp32")
    return moments if given.get("optimizer") != "sgd" else {}


def schedule(given: Given, plan: Plan) -> None:
    """Carry over Megatron's ``OptimizerParamScheduler``, which counts samples where ``train_samples`` is given."""
    given = _without_what_it_ignores(given, plan)
    in_samples = given.get("train_samples") is not None or any(given.get(f"{name}_samples") for name in _LENGTHS)
    names = {**_SCHEDULE, **_length_names(given, in_samples)}
    found = take(given, plan, tuple(names), lambda name: f"LRSchedule({names[name]}=)")
    constant_decay = given.get("weight_decay_incr_style") in (None, "constant")
    if constant_decay and found.get("start_weight_decay") != found.get("end_weight_decay"):
        raise MigrationError(
            f"start_weight_decay={found.get('start_weight_decay')}, end_weight_decay={found.get('end_weight_decay')}:"
            " with weight_decay_incr_style='constant' they are equal or left out."
        )
    if not found:
        return
    arguments: dict[str, Any] = {"style": "linear", **{names[name]: value for name, value in found.items()}}
    if found.get("lr_warmup_fraction") is not None and arguments.pop("warmup_steps", 0):
        raise MigrationError("lr_warmup_fraction and lr_warmup_iters: give one.")
    if arguments.get("warmup_fraction") == 0:
        del arguments["warmup_fraction"]
    _put_lengths(arguments, given, plan, in_samples)
    if arguments["style"] == "inverse-square-root" and not {"warmup_steps", "warmup_fraction"} & arguments.keys():
        says = "without a warm-up Megatron's rate falls with the samples of a batch, here with steps; give a warm-up"
        plan.say("lr_warmup", None, "yours to do", says)
    plan.put(f"{MODULE}.lr_schedule.class_path", "lightning_megatron.LRSchedule")
    plan.put(SCHEDULE, arguments)


def _length_names(given: Given, in_samples: bool) -> dict[str, str]:
    """The settings of lengths, in samples or in steps, and what ``LRSchedule`` calls them.

    Raises:
        MigrationError: A length is given in the other unit.
    """
    unit, other = ("samples", "iters") if in_samples else ("iters", "samples")
    wrong = [name for name in (f"{length}_{other}" for length in _LENGTHS) if given.get(name)]
    if wrong:
        plan_by = "samples" if in_samples else "steps"
        raise MigrationError(f"{wrong[0]}={given[wrong[0]]}: this run counts {plan_by}; give it in {plan_by}, too.")
    return {f"{length}_{unit}": mine for length, mine in _LENGTHS.items()}


def _put_lengths(arguments: dict[str, Any], given: Given, plan: Plan, in_samples: bool) -> None:
    """Complete the arguments of ``LRSchedule`` with their unit and what follows from the length of the run."""
    whole_run = given.get("train_samples") if in_samples else given.get("train_iters")
    if not in_samples and growth(given) is not None and (size := full_batch(given)) is not None:
        # Megatron-LM counts samples in any case: iterations of the schedule are so many full batches.
        in_samples, whole_run = True, whole_run and whole_run * size
        arguments |= {name: arguments[name] * size for name in _LENGTHS.values() if arguments.get(name)}
        plan.say("schedule", None, "carried over", f"in samples, since batches grow: an iteration is {size}")
    if in_samples:
        arguments["unit"] = "samples"
        if whole_run:
            arguments.setdefault("decay_steps", whole_run)
    rises = arguments.get("weight_decay_style", "constant") != "constant"
    if rises and whole_run and arguments.get("decay_steps") not in (None, whole_run):
        arguments["weight_decay_steps"] = whole_run


def _without_what_it_ignores(given: Given, plan: Plan) -> Given:
    """The settings but for those of the schedule that Megatron does not look at beside the others."""
    ignored = {}
    if given.get("lr_decay_style") != "WSD":
        ignored = dict.fromkeys(
            ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"), "lr_decay_style=WSD"
        )
    if not any(given.get(f"lr_warmup_{name}") for name in ("iters", "samples", "fraction")):
        ignored["lr_warmup_init"] = "a warm-up"
    for name, what in ignored.items():
        if given.get(name) is not None:
            plan.say(name, given[name], "not needed", f"Megatron looks at it only with {what}")
    return {name: value for name, value in given.items() if name not in ignored}
