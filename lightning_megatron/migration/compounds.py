"""Settings of Megatron-LM that mean something only together: batches, schedules, positions, data, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning_megatron.data import RampUp
from lightning_megatron.migration.homes import CONFIG, DATA, MODULE, SCHEDULE, STRATEGY
from lightning_megatron.migration.plan import MigrationError, Plan

Given = Mapping[str, Any]
MODELS = {"gpt": ("GPTModule", "GPTSamples"), "bert": ("BertModule", "BertSamples"), "t5": ("T5Module", "T5Samples")}
# Megatron-LM's defaults, where they are not ours.
_DEFAULTS = {"weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "sgd_momentum": 0.9}


def settle(given: Given, plan: Plan) -> None:
    """Carry over what goes together.

    Args:
        given: All settings, by Megatron's names, with their values read.
        plan: With what stands alone in it already.
    """
    for part in (_precision, _virtual_stages, _positions, _activation, _groups, _window, _batches, _data, _documents,
                 _length, _optimizer, _schedule, _evaluation, _checkpoints, _loggers):  # fmt: skip
        part(given, plan)


def _take(given: Given, plan: Plan, names: tuple[str, ...], says: str | Callable[[str], str]) -> dict[str, Any]:
    """Those of ``names`` that were given, each with its line."""
    found = {name: given[name] for name in names if given.get(name) is not None}
    for name, value in found.items():
        plan.say(name, value, "carried over", says if isinstance(says, str) else says(name))
    return found


def _precision(given: Given, plan: Plan) -> None:
    found = _take(given, plan, ("bf16", "fp16"), "Trainer(precision=)")
    if found.get("bf16") and found.get("fp16"):
        raise MigrationError("bf16 and fp16: give one.")
    for name, precision in (("bf16", "bf16-mixed"), ("fp16", "16-mixed")):
        if found.get(name):
            plan.put("trainer.precision", precision)


def _virtual_stages(given: Given, plan: Plan) -> None:
    name = "num_layers_per_virtual_pipeline_stage"
    each = given.get(name)
    if each is None:
        return
    layers, pp = given.get("num_layers"), given.get("pipeline_model_parallel_size", 1)
    if layers is None:
        plan.say(name, each, "yours to do", f"MegatronStrategy(vp=): the model's layers / {pp} stages / {each}")
    elif layers % (pp * each):
        raise MigrationError(
            f"{name}={each}: {layers} layers on {pp} stages are no multiple of it. Use a number that divides"
            f" {layers // pp if layers % pp == 0 else layers}."
        )
    else:
        plan.put(f"{STRATEGY}.vp", layers // pp // each)
        plan.say(name, each, "carried over", f"MegatronStrategy(vp={layers // pp // each}), chunks in place of layers")


def _positions(given: Given, plan: Plan) -> None:
    names = {"learned_absolute": "learned", "rope": "rope", "none": "none"}
    kind = given.get("position_embedding_type")
    if kind is not None and kind not in names:
        plan.say("position_embedding_type", kind, "not here", f"positions are one of {', '.join(names)}")
    elif kind is not None:
        plan.put(f"{CONFIG}.position_embedding", names[kind])
        plan.say("position_embedding_type", kind, "carried over", "config.position_embedding")
    if given.get("use_rotary_position_embeddings") is not None:
        rotary = given["use_rotary_position_embeddings"]
        if rotary:
            plan.put(f"{CONFIG}.position_embedding", "rope")
        plan.say("use_rotary_position_embeddings", rotary, "carried over", "config.position_embedding")
    if _take(given, plan, ("use_rope_scaling", "rope_scaling_factor"), "config.rope_scaling").get("use_rope_scaling"):
        # Megatron-LM's RotaryEmbedding: Llama 3.1's rule with its constants, the factor aside.
        plan.put(
            f"{CONFIG}.rope_scaling",
            {"rope_type": "llama3", "factor": given.get("rope_scaling_factor") or 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        )  # fmt: skip
    longest, length = given.get("max_position_embeddings"), given.get("seq_length")
    if longest is not None and length is not None and longest > length:
        plan.put(f"{CONFIG}.seq_length", longest)
        plan.say("max_position_embeddings", longest, "carried over", "config.seq_length; batches may be shorter")
    elif longest is not None:
        if length is None:
            plan.put(f"{CONFIG}.seq_length", longest)
        plan.say("max_position_embeddings", longest, "carried over", "config.seq_length")


def _activation(given: Given, plan: Plan) -> None:
    for name, activation in (("swiglu", "swiglu"), ("squared_relu", "squared_relu"), ("openai_gelu", "gelu_tanh")):
        if given.get(name) is not None:
            if given[name]:
                plan.put(f"{CONFIG}.activation", activation)
            plan.say(name, given[name], "carried over", "config.activation")
    if given.get("swiglu") and given.get("ffn_hidden_size") is None and given.get("hidden_size") is not None:
        width = int(4 * given["hidden_size"] * 2 / 3 / 64) * 64
        plan.put(f"{CONFIG}.ffn_hidden_size", width)
        plan.say("ffn_hidden_size", None, "carried over", f"{width}: two thirds with swiglu, by Megatron-LM's rule")


def _groups(given: Given, plan: Plan) -> None:
    if given.get("num_query_groups") is not None and not given.get("group_query_attention"):
        says = "Megatron looks at it only with group_query_attention"
        plan.say("num_query_groups", given["num_query_groups"], "not needed", says)
        return
    found = _take(given, plan, ("group_query_attention", "num_query_groups"), "config.num_query_groups")
    if found.get("group_query_attention"):
        plan.put(f"{CONFIG}.num_query_groups", found.get("num_query_groups", 1))


def _window(given: Given, plan: Plan) -> None:
    window = given.get("window_size")
    if window is None:
        return
    parts = [part.strip("(),") for part in window]
    left, right = (int(part) for part in (parts if len(parts) == 2 else parts[0].split(",")))
    if right not in (0, -1):
        plan.say("window_size", window, "not here", "a window looks back only: LEFT,0")
        return
    plan.put(f"{CONFIG}.sliding_window", left + 1)
    plan.say("window_size", ",".join(parts), "carried over", "config.sliding_window counts the token itself, too")


def _batches(given: Given, plan: Plan) -> None:
    size = given.get("global_batch_size")
    if size is None:
        return
    if plan.get(f"{DATA}.paths") or given.get("data_path"):
        plan.put(f"{DATA}.global_batch_size", size)
        plan.say("global_batch_size", size, "carried over", "MegatronDataModule(global_batch_size=)")
    else:
        plan.say("global_batch_size", size, "yours to do", "batch_size of the loader is this / data-parallel size")
    growing = given.get("rampup_batch_size")
    if growing is not None:
        if len(growing) != 3:
            raise MigrationError(f"rampup_batch_size={' '.join(growing)!r}: use START INCREMENT SAMPLES.")
        names = dict(zip(("start", "increment", "samples"), map(int, growing), strict=True))
        plan.put(f"{DATA}.ramp_up", {"class_path": "lightning_megatron.data.RampUp", "init_args": names})
        plan.say("rampup_batch_size", " ".join(growing), "carried over", "MegatronDataModule(ramp_up=RampUp(...))")


def _data(given: Given, plan: Plan) -> None:
    paths = given.get("data_path")
    if paths is None:
        return
    weights = [float(word) for word in paths[::2]] if len(paths) > 1 and _is_number(paths[0]) else None
    plan.put("data.class_path", "lightning_megatron.data.MegatronDataModule")
    plan.put(f"{DATA}.paths", paths[1::2] if weights else paths)
    if weights:
        plan.put(f"{DATA}.weights", weights)
    module = str(plan.get("model.class_path", "GPTModule")).rpartition(".")[2]
    samples = next((samples for name, samples in MODELS.values() if name == module), "GPTSamples")
    length = {"seq_length": given.get("seq_length") or given.get("encoder_seq_length") or 1024}
    if samples == "T5Samples" and given.get("decoder_seq_length"):
        length["decoder_seq_length"] = given["decoder_seq_length"]
    if samples == "BertSamples":
        length["binary_head"] = plan.get(f"{CONFIG}.task", "pretraining") == "pretraining"
    plan.put(f"{DATA}.samples", {"class_path": f"lightning_megatron.data.{samples}", "init_args": length})
    plan.say("data_path", " ".join(paths), "carried over", "MegatronDataModule(paths=, weights=)")
    if given.get("tokenizer_model") is None:
        plan.put(f"{DATA}.tokenizer", "YOUR-TOKENIZER")
        plan.say(
            "tokenizer", None, "yours to do", "data.init_args.tokenizer: a tokenizer.json, or transformers' folder"
        )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _documents(given: Given, plan: Plan) -> None:
    names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    samples = plan.get(f"{DATA}.samples.class_path", "")
    if samples.endswith("GPTSamples"):
        place = f"{DATA}.samples.init_args"
        found = _take(given, plan, names, "GPTSamples of the data module")
    else:
        place = MODULE
        found = _take(given, plan, names, "of the module, with eod_id")
        if any(found.values()) and given.get("eos_token_id") is None:
            plan.put(f"{MODULE}.eod_id", 0)
            plan.say("eod_id", None, "yours to do", "model.init_args.eod_id: the token that ends a document")
    for name, value in found.items():
        plan.put(f"{place}.{name}", value)


def _length(given: Given, plan: Plan) -> None:
    steps, samples = given.get("train_iters"), given.get("train_samples")
    if steps is not None:
        plan.put("trainer.max_steps", steps)
        plan.say("train_iters", steps, "Lightning's", "Trainer(max_steps=), which also ends the run")
    if samples is not None:
        size = given.get("global_batch_size")
        if steps is not None:
            raise MigrationError(f"train_iters={steps} and train_samples={samples}: give one.")
        if size is None:
            plan.say("train_samples", samples, "yours to do", "Trainer(max_steps=): samples / global batch")
        else:
            plan.put("trainer.max_steps", _steps(samples, size, given.get("rampup_batch_size")))
            plan.say("train_samples", samples, "Lightning's", "Trainer(max_steps=), batches that have that many")


def _steps(samples: int, size: int, growing: list[str] | None) -> int:
    """Global batches that hold ``samples``."""
    steps = consumed = 0
    if growing is not None:
        rule = RampUp(*map(int, growing))
        while consumed < samples and rule.size(consumed, size) < size:
            consumed += rule.size(consumed, size)
            steps += 1
    return steps + math.ceil(max(samples - consumed, 0) / size)


def _optimizer(given: Given, plan: Plan) -> None:
    kind = given.get("optimizer")
    names = ("optimizer", "lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum")
    if not any(given.get(name) is not None for name in names):
        return
    _take(given, plan, names, "the torch optimizer in model.init_args.optimizer")
    known = {**_DEFAULTS, **{name: given[name] for name in names if given.get(name) is not None}}
    decay = {"weight_decay": known["weight_decay"]}
    rate = {"lr": known["lr"]} if "lr" in known else {"lr": 1e-3}
    if "lr" not in known:
        plan.say("lr", None, "yours to do", "the optimizer's learning rate is 0.001 until you say another")
    if kind == "sgd":
        made = {"class_path": "torch.optim.SGD", "init_args": {**rate, **decay, "momentum": known["sgd_momentum"]}}
    else:
        betas = {"betas": [known["adam_beta1"], known["adam_beta2"]], "eps": known["adam_eps"]}
        made = {"class_path": "torch.optim.AdamW", "init_args": {**rate, **decay, **betas}}
    groups = {"optimizer": made, "no_weight_decay": "lightning_megatron.biases_and_vectors"}
    plan.put(f"{MODULE}.optimizer", {"class_path": "lightning_megatron.ParameterGroups", "init_args": groups})
    plan.say("no weight decay", None, "carried over", "Megatron's rule, biases and vectors: ParameterGroups")


def _schedule(given: Given, plan: Plan) -> None:
    """Megatron's schedule (``OptimizerParamScheduler``), which counts samples where ``train_samples`` is given."""
    simple = {
        "lr_decay_style": "style", "min_lr": "min_lr", "lr_warmup_init": "init_lr",
        "lr_warmup_fraction": "warmup_fraction", "weight_decay_incr_style": "weight_decay_style",
        "start_weight_decay": "start_weight_decay", "end_weight_decay": "end_weight_decay",
        "lr_wsd_decay_style": "wsd_decay_style", "lr_wsd_decay_iters": "wsd_decay_steps",
    }  # fmt: skip
    lengths = {"lr_warmup_iters": "warmup_steps", "lr_decay_iters": "decay_steps"}
    by_samples = {"lr_warmup_samples": "warmup_steps", "lr_decay_samples": "decay_steps"}
    samples = given.get("train_samples") is not None or any(given.get(name) for name in by_samples)
    for mine, others in ((lengths, by_samples), (by_samples, lengths)):
        if samples == (mine is by_samples) and (wrong := [name for name in others if given.get(name)]):
            plan_by = "samples" if samples else "steps"
            raise MigrationError(f"{wrong[0]}={given[wrong[0]]}: this run counts {plan_by}; give it in {plan_by}, too.")
    names = {**simple, **(by_samples if samples else lengths)}
    found = _take(given, plan, tuple(names), lambda name: f"LRSchedule({names[name]}=)")
    if given.get("weight_decay_incr_style") in (None, "constant") and found.get("start_weight_decay") != found.get(
        "end_weight_decay"
    ):
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
    if samples:
        arguments["unit"] = "samples"
    whole_run = given.get("train_samples") if samples else given.get("train_iters")
    rises = arguments.get("weight_decay_style", "constant") != "constant"
    if rises and whole_run and arguments.get("decay_steps") not in (None, whole_run):
        arguments["weight_decay_steps"] = whole_run
    if arguments["style"] == "inverse-square-root" and not {"warmup_steps", "warmup_fraction"} & arguments.keys():
        says = "without a warm-up Megatron's rate falls with the samples of a batch, here with steps; give a warm-up"
        plan.say("lr_warmup", None, "yours to do", says)
    plan.put(f"{MODULE}.lr_schedule.class_path", "lightning_megatron.LRSchedule")
    plan.put(SCHEDULE, arguments)


def _evaluation(given: Given, plan: Plan) -> None:
    every, batches = given.get("eval_interval"), given.get("eval_iters")
    if every is not None:
        plan.put("trainer.val_check_interval", every)
        plan.put("trainer.check_val_every_n_epoch", None)
        plan.say("eval_interval", every, "Lightning's", "Trainer(val_check_interval=, check_val_every_n_epoch=None)")
    if batches is not None:
        plan.put("trainer.limit_val_batches", batches)
        plan.put("trainer.limit_test_batches", batches)
        plan.say("eval_iters", batches, "Lightning's", "Trainer(limit_val_batches=, limit_test_batches=)")


def _checkpoints(given: Given, plan: Plan) -> None:
    weights_only = given.get("no_save_optim")
    found = {name: given[name] for name in ("save", "save_interval", "no_save_optim") if given.get(name) is not None}
    if not found:
        return
    for name, value in found.items():
        plan.say(name, value, "Lightning's", "ModelCheckpoint among the Trainer's callbacks")
    arguments: dict[str, Any] = {"dirpath": given.get("save") or "checkpoints", "save_last": True, "save_top_k": -1}
    if given.get("save_interval") is not None:
        arguments["every_n_train_steps"] = given["save_interval"]
    if weights_only:
        arguments["save_weights_only"] = True
    callbacks = plan.get("trainer.callbacks", [])
    plan.put("trainer.callbacks", [*callbacks, {"class_path": "ModelCheckpoint", "init_args": arguments}])


def _loggers(given: Given, plan: Plan) -> None:
    loggers = []
    if (folder := given.get("tensorboard_dir")) is not None:
        loggers.append({"class_path": "TensorBoardLogger", "init_args": {"save_dir": folder}})
        plan.say("tensorboard_dir", folder, "Lightning's", "TensorBoardLogger(save_dir=)")
    wandb = {"wandb_project": "project", "wandb_exp_name": "name", "wandb_save_dir": "save_dir"}
    found = {mine: given[name] for name, mine in wandb.items() if given.get(name) is not None}
    if found:
        loggers.append({"class_path": "WandbLogger", "init_args": found})
        for name, mine in wandb.items():
            if mine in found:
                plan.say(name, found[mine], "Lightning's", f"WandbLogger({mine}=)")
    if loggers:
        plan.put("trainer.logger", loggers)
