"""Reads Accelerate's configuration of its Megatron-LM plugin, from YAML, the environment or the plugin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_megatron.cli.migrate.carry_over import carry_over, read, refuse
from lightning_megatron.cli.migrate.plan import Fate, MigrationError, Plan, nearest
from lightning_megatron.cli.migrate.settings_table import CONFIG, MODULE, STRATEGY
from lightning_megatron.cli.migrate.values import whole

_PREFIX = "megatron_lm_"
# The plugin's parameters that are Megatron's under its own or another name.
MEGATRON = {
    "tp_degree": "tensor_model_parallel_size",
    "pp_degree": "pipeline_model_parallel_size",
    "gradient_clipping": "clip_grad",
    "sequence_parallelism": "sequence_parallel",
    "pipeline_model_parallel_split_rank": "pipeline_model_parallel_split_rank",
    **{
        name: name
        for name in (
            "recompute_activations", "use_distributed_optimizer", "num_layers_per_virtual_pipeline_stage",
            "train_iters", "train_samples", "weight_decay_incr_style", "start_weight_decay", "end_weight_decay",
            "lr_decay_style", "lr_decay_iters", "lr_decay_samples", "lr_warmup_iters", "lr_warmup_samples",
            "lr_warmup_fraction", "min_lr",
            "seq_length", "encoder_seq_length", "decoder_seq_length", "tensorboard_dir", "eval_iters", "eval_interval",
            "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
            "calculate_per_token_loss", "recompute_granularity", "recompute_method", "recompute_num_layers",
            "use_rotary_position_embeddings", "attention_dropout", "hidden_dropout", "attention_softmax_in_fp32",
            "attention_backend", "eod_mask_loss", "decoder_last_pipeline_num_layers", "optimizer_cpu_offload",
            "overlap_cpu_optimizer_d2h_h2d", "use_precision_aware_optimizer", "no_load_optim", "no_save_optim",
            "use_custom_fsdp",
        )
    },
}  # fmt: skip


@dataclass(frozen=True)
class _Said:
    fate: Fate
    says: str


# The plugin's other parameters: what is said of each.
OTHERS = {
    "num_micro_batches": _Said("carried over", "MegatronStrategy(num_microbatches=)"),
    "is_train_batch_min": _Said("not needed", "each loader keeps its own batch_size"),
    "consumed_samples": _Said("not needed", "a resumed run knows its place in the data"),
    "no_wd_decay_cond": _Said(
        "yours to do",
        "accelerate has ignored it since 1.13; here ParameterGroups(..., no_weight_decay=FUNCTION) as the optimizer",
    ),
    "scale_lr_cond": _Said(
        "yours to do",
        "accelerate has ignored it since 1.13; here ParameterGroups(..., scale_lr=FUNCTION, lr_mult=)",
    ),
    "lr_mult": _Said("yours to do", "goes with scale_lr_cond: ParameterGroups(lr_mult=)"),
    "megatron_dataset_flag": _Said(
        "yours to do", "indexed data is lightning_megatron.data.MegatronDataModule in the run's data"
    ),
    "set_all_logging_options": _Said(
        "yours to do", "norms, throughput, memory and times are callbacks of lightning_megatron.callbacks"
    ),
    "return_logits": _Said("not needed", "trainer.predict gives logits; loss(output, batch) of a subclass sees them"),
    "custom_train_step_class": _Said("yours to do", "a subclass of the module with its own training_step"),
    "custom_train_step_kwargs": _Said("yours to do", "arguments of that subclass"),
    "custom_model_provider_function": _Said(
        "yours to do", "a subclass with build_model(pre_process, post_process, vp_stage)"
    ),
    "custom_prepare_model_function": _Said("yours to do", "override build_model; the strategy wraps (ddp=)"),
    "custom_megatron_datasets_provider_function": _Said("yours to do", "a LightningDataModule of your own"),
    "custom_get_batch_function": _Said("yours to do", "a subclass with get_batch(batch)"),
    "custom_loss_function": _Said("yours to do", "a subclass with loss(output, batch)"),
    "other_megatron_args": _Said("carried over", "each on a line of its own"),
}
PARAMETERS = {**MEGATRON, **OTHERS}
# What the plugin fills in by itself, so that nobody can tell whether it was asked for, and what is done about it.
_FILLED_IN: dict[str, tuple[Any, str]] = {
    "context_parallel_size": (2, "accelerate's own default, which cuts no batch; here cp=1"),
    "recompute_granularity": ("full", "accelerate's own default, which nothing turned off; here nothing is recomputed"),
    "recompute_method": ("uniform", "goes with recompute_granularity"),
    "recompute_num_layers": (1, "goes with recompute_granularity"),
    "use_rotary_position_embeddings": (True, "accelerate's own default; here positions are the model's"),
    "calculate_per_token_loss": (True, "accelerate's own default; here losses are weighed by tokens, too"),
    "attention_backend": (True, "had no effect"),
    "attention_softmax_in_fp32": (True, "accelerate's own default"),
    "attention_dropout": (0.0, "accelerate's own default; here dropout is the model's"),
    "hidden_dropout": (0.0, "accelerate's own default; here dropout is the model's"),
    "expert_model_parallel_size": (1, "no experts"),
    "expert_tensor_parallel_size": (1, "no experts"),
    "min_lr": (0, "as here"),
    "weight_decay_incr_style": ("constant", "as here"),
    "eval_iters": (100, "accelerate's own default, which never ran an evaluation"),
    "eval_interval": (1000, "accelerate's own default, which never ran an evaluation"),
}
_IGNORED = {
    "compute_environment", "debug", "deepspeed_config", "downcast_bf16", "dynamo_config", "enable_cpu_affinity",
    "fp8_config", "fsdp_config", "gpu_ids", "ipex_config", "main_training_function", "parallelism_config",
    "rdzv_backend", "same_network", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_mps_device", "commands",
    "command_file", "tpu_name", "tpu_zone", "ec2_instance_type", "mpirun_config",
}  # fmt: skip
_TOP = {
    "distributed_type", "megatron_lm_config", "mixed_precision", "num_processes", "num_machines", "machine_rank",
    "main_process_ip", "main_process_port", "use_cpu", "gradient_accumulation_steps",
}  # fmt: skip
_PRECISIONS = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed", "fp8": "transformer-engine"}


def from_accelerate(
    config: str | Path | Mapping[str, Any], model: str | None = None, environment: Mapping[str, str] | None = None
) -> Plan:
    """The run that does what an accelerate configuration asks for.

    Args:
        config: The file that ``accelerate config`` wrote, or its content.
        model: transformers' directory or name of the model that the script made, where it is known.
        environment: Variables (``MEGATRON_LM_TP_DEGREE``) that fill in what the configuration leaves out.

    Raises:
        MigrationError: The configuration is not of the Megatron-LM plugin, or a setting is unknown or cannot be read.
        LayoutError: The parallel sizes do not divide the model or the batch.
    """
    settings = dict(config) if isinstance(config, Mapping) else _load(Path(config))
    environment = environment or {}
    known = _TOP | _IGNORED
    refuse([f"{name}: accelerate has no such setting.{nearest(name, known)}" for name in settings if name not in known])
    kind = str(
        settings.get("distributed_type", "MEGATRON_LM" if environment.get("ACCELERATE_USE_MEGATRON_LM") else None)
    )
    if kind != "MEGATRON_LM":
        raise MigrationError(
            f"distributed_type={kind}: this command reads configurations of accelerate's Megatron-LM plugin, with"
            " distributed_type: MEGATRON_LM."
        )
    plan = Plan("accelerate's configuration" if isinstance(config, Mapping) else f"accelerate's {config}", _called)
    plan.say("distributed_type", kind, "carried over", "the strategy is MegatronStrategy")
    world_size = _processes(settings, plan)
    _precision(settings.get("mixed_precision", environment.get("ACCELERATE_MIXED_PRECISION")), plan)
    _accumulation(
        settings.get("gradient_accumulation_steps", environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")), plan
    )
    ignored = settings.keys() & _IGNORED
    if settings.get("fp8_config"):
        ignored -= {"fp8_config"}
        says = "MegatronPrecision('transformer-engine', recipe=DelayedScaling(...)) in place of the Trainer's precision"
        plan.say("fp8_config", _short(settings["fp8_config"]), "yours to do", says)
    for name in sorted(ignored):
        plan.say(name, settings[name] or None, "not needed", "it does not reach the Megatron-LM plugin")
    for name in environment:
        if (
            name.startswith(_PREFIX.upper())
            and (parameter := name.removeprefix(_PREFIX.upper()).lower()) not in PARAMETERS
        ):
            says = f"accelerate reads no such variable.{nearest(parameter, PARAMETERS)}"
            plan.say(name, environment[name], "not needed", says)
    _plugin(_parameters(settings.get("megatron_lm_config") or {}, environment), plan, model, world_size)
    return plan


def from_plugin(plugin: Any, model: str | None = None, *, world_size: int | None = None) -> Plan:
    """The run that does what a ``MegatronLMPlugin`` asks for.

    Args:
        plugin: The plugin, or a mapping of its arguments.
        model: transformers' directory or name of the model, where it is known.
        world_size: Number of ranks, if it is known.

    Raises:
        MigrationError: An argument that the plugin does not have, or that cannot be read.
        LayoutError: The parallel sizes do not divide the model or the batch.
    """
    plan = Plan("accelerate's MegatronLMPlugin", _called)
    asked = dict(plugin) if isinstance(plugin, Mapping) else _asked(plugin, plan)
    unknown = [name for name in asked if name not in PARAMETERS]
    refuse([f"{name}: MegatronLMPlugin has no such argument.{nearest(name, PARAMETERS)}" for name in unknown])
    if world_size is not None:
        plan.put("trainer.devices", world_size)
    _plugin(asked, plan, model, world_size)
    return plan


def _called(name: str) -> str:
    return next((mine for mine, megatrons in MEGATRON.items() if megatrons == name), name)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MigrationError(f"{path}: this is no YAML ({str(error).splitlines()[0]}).") from None
    if not isinstance(content, dict):
        raise MigrationError(f"{path}: this is no configuration of accelerate, which `accelerate config` writes.")
    return content


def _processes(settings: Mapping[str, Any], plan: Plan) -> int | None:
    nodes = whole("num_machines", settings.get("num_machines") or 1)
    cpu = str(settings.get("use_cpu", False)).lower() == "true"
    plan.put("trainer.accelerator", "cpu" if cpu else "gpu")
    plan.say("use_cpu", cpu, "Lightning's", "Trainer(accelerator=)")
    plan.put("trainer.num_nodes", nodes)
    if "num_machines" in settings:
        plan.say("num_machines", nodes, "Lightning's", "Trainer(num_nodes=)")
    world = settings.get("num_processes")
    if world is None:
        plan.say("num_processes", None, "yours to do", "Trainer(devices=): GPUs of a machine")
    else:
        world = whole("num_processes", world)
        if nodes < 1 or world % nodes:
            raise MigrationError(f"num_processes={world}: {nodes} machines do not share them evenly.")
        plan.put("trainer.devices", world // nodes)
        plan.say("num_processes", world, "Lightning's", "Trainer(devices=), those of one machine")
    where = {name: settings[name] for name in ("machine_rank", "main_process_ip", "main_process_port") if
             settings.get(name) is not None}  # fmt: skip
    launch = (
        f"torchrun --nnodes {nodes} --node-rank MACHINE --nproc-per-node {(world or nodes) // nodes} --master-addr"
        f" {where.get('main_process_ip', 'FIRST-MACHINE')} --master-port {where.get('main_process_port', 29500)}"
        " -m lightning_megatron fit --config run.yaml"
    )
    for name, value in where.items():
        plan.say(name, value, "Lightning's", f"of torchrun: {launch}" if nodes > 1 else "one machine needs none")
    return world


def _precision(word: Any, plan: Plan) -> None:
    if word is None or word is False:  # YAML's "no"
        word = "no"
    if word not in _PRECISIONS:
        raise MigrationError(f"mixed_precision={word}: use one of {', '.join(_PRECISIONS)}.")
    plan.put("trainer.precision", _PRECISIONS[word])
    plan.say("mixed_precision", word, "Lightning's", f"Trainer(precision={_PRECISIONS[word]!r})")
    if word == "fp8":
        says = "a GPT with GPTConfig(layers='transformer_engine'), which alone is in fp8; else precision bf16-mixed"
        plan.say("fp8", None, "yours to do", says)


def _accumulation(steps: Any, plan: Plan) -> None:
    if steps is None:
        return
    steps = whole("gradient_accumulation_steps", steps)
    says = "accelerate stepped at every call all the same; Trainer(accumulate_grad_batches=) really accumulates"
    plan.say("gradient_accumulation_steps", steps, "not needed" if steps == 1 else "yours to do", says)


def _parameters(block: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The plugin's parameters, of the configuration's block and the environment behind it."""
    known = {f"{_PREFIX}{name}" for name in PARAMETERS}
    wrong = "accelerate has no such key, and leaves it out without a word."
    refuse([f"megatron_lm_config.{key}: {wrong}{nearest(key, known)}" for key in block if key not in known])
    found = {
        name.removeprefix(_PREFIX.upper()).lower(): value
        for name, value in environment.items()
        if name.startswith(_PREFIX.upper()) and name.removeprefix(_PREFIX.upper()).lower() in PARAMETERS
    }
    return found | {key.removeprefix(_PREFIX): value for key, value in block.items()}


def _asked(plugin: Any, plan: Plan) -> dict[str, Any]:
    """Return the settings of a plugin that differ from those that it fills in by itself."""
    asked = {name: value for name, value in vars(plugin).items() if name in PARAMETERS and value is not None}
    for name, (usual, why) in _FILLED_IN.items():
        if asked.get(name) == usual:
            del asked[name]
            plan.say(name, usual, "not needed", f"{why}; if you meant it, give the arguments as a mapping")
    for name in PARAMETERS:
        if asked.get(name) is False or asked.get(name) == [] or (name == "lr_mult" and asked.get(name) == 1.0):
            del asked[name]
    return asked


def _plugin(asked: Mapping[str, Any], plan: Plan, model: str | None, world_size: int | None) -> None:
    given = read({MEGATRON[name]: value for name, value in asked.items() if name in MEGATRON}, _called)
    others = asked.get("other_megatron_args") or {}
    if not isinstance(others, Mapping):
        raise MigrationError(f"other_megatron_args={others!r}: give Megatron's names and their values, as a mapping.")
    given |= read(others, lambda name: f"other_megatron_args[{name!r}]")
    if "clip_grad" not in given:
        given["clip_grad"] = 1.0  # accelerate's default; Lightning's is none
    if given.get("recompute_activations") and "recompute_granularity" in given:
        del given["recompute_activations"]
        plan.say("recompute_activations", True, "not needed", "accelerate drops it beside recompute_granularity")
    carry_over(given, plan, model, world_size)
    for name in asked.keys() & OTHERS.keys():
        if asked[name] is not None:
            plan.say(name, _short(asked[name]), OTHERS[name].fate, OTHERS[name].says)
    if asked.get("num_micro_batches") is not None:
        plan.put(f"{STRATEGY}.num_microbatches", whole("num_micro_batches", asked["num_micro_batches"]))
    _usual(asked, given, plan, model)


def _usual(asked: Mapping[str, Any], given: Mapping[str, Any], plan: Plan, model: str | None) -> None:
    """Fill in accelerate's defaults where this project's differ."""
    micro_batches = plan.get(f"{STRATEGY}.num_microbatches", 1)
    plan.say(
        "DataLoader(batch_size=b)", None, "yours to do",
        f"accelerate's b is a micro-batch: use b × {micro_batches}, the data of one optimizer step of a replica",
    )  # fmt: skip
    if model is None:
        plan.say("model", None, "yours to do", "model.init_args.source: its directory or name; its weights come along")
    if "context_parallel_size" not in given:
        plan.say("context_parallel_size", None, "not needed", "accelerate would take 2 and cut no batch; here it is 1")
    if "use_distributed_optimizer" not in given:
        plan.say("use_distributed_optimizer", None, "carried over", "accelerate: off; here on, with the same numbers")
    if "recompute_granularity" not in given and "recompute_activations" not in given:
        plan.say("recompute_granularity", None, "not needed", "accelerate recomputes all; here nothing, until asked")
    if asked.get("calculate_per_token_loss") is None:
        plan.say(
            "calculate_per_token_loss", None, "not needed",
            "accelerate's gradients are dp·cp times too large, which clipping hides; here they are the global batch's",
        )  # fmt: skip
    if plan.get(f"{CONFIG}.position_embedding") is None:
        plan.say("use_rotary_position_embeddings", None, "not needed", "accelerate rotates all; here as the model is")
    if plan.get(f"{MODULE}.optimizer") is None:
        plan.say("optimizer", None, "yours to do", "model.init_args.optimizer: your script's; its rate is the peak")


def _short(value: Any) -> str:
    text = getattr(value, "__name__", None) or str(value)
    return text if len(text) < 60 else text[:57] + "..."


def environment_of_this_process() -> dict[str, str]:
    """The variables that accelerate's launcher sets."""
    return {name: value for name, value in os.environ.items() if name.startswith(("MEGATRON_LM_", "ACCELERATE_"))}
