"""Megatron-LM's settings that are the Trainer's here: precision, time-outs, length, evaluation, saves, loggers."""

from __future__ import annotations

import math
from typing import Any

from lightning_megatron.cli.migrate.batch_settings import full_batch, growth
from lightning_megatron.cli.migrate.plan import Given, MigrationError, Plan, take
from lightning_megatron.cli.migrate.settings_table import STRATEGY
from lightning_megatron.data.indexed.batch_size_rampup import BatchSizes


def precision(given: Given, plan: Plan) -> None:
    """Carry over bf16 and fp16, and the loss scale that fp16 starts with."""
    found = take(given, plan, ("bf16", "fp16"), "Trainer(precision=)")
    if found.get("bf16") and found.get("fp16"):
        raise MigrationError("bf16 and fp16: give one.")
    for name, precision in (("bf16", "bf16-mixed"), ("fp16", "16-mixed")):
        if found.get(name):
            plan.put("trainer.precision", precision)
    scale = given.get("initial_loss_scale")
    if scale is not None and plan.get("trainer.precision") == "16-mixed":
        plugin = {"precision": "16-mixed", "initial_loss_scale": scale}
        plan.put("trainer.plugins", [{"class_path": "lightning_megatron.MegatronPrecision", "init_args": plugin}])
        del plan.run["trainer"]["precision"]  # Lightning takes one of the two
        says = "MegatronPrecision(initial_loss_scale=), a plugin of the Trainer in place of its precision"
        plan.say("initial_loss_scale", scale, "carried over", says, "trainer.plugins")
    elif scale is not None:
        plan.say("initial_loss_scale", scale, "not needed", "of fp16 alone")


def timeouts(given: Given, plan: Plan) -> None:
    """Carry over how long ranks wait for one another, and how long after the first step if that is less."""
    minutes, seconds = given.get("distributed_timeout_minutes"), given.get("distributed_timeout_seconds_after_init")
    if minutes is not None:
        name = "timeout" if seconds is None else "start_timeout"
        place = f"{STRATEGY}.{name}"
        plan.put(place, _as_time(60 * minutes))
        plan.say("distributed_timeout_minutes", minutes, "carried over", f"MegatronStrategy({name}=)", place)
    if seconds is not None:
        place = f"{STRATEGY}.timeout"
        plan.put(place, _as_time(seconds))
        plan.say("distributed_timeout_seconds_after_init", seconds, "carried over", "MegatronStrategy(timeout=)", place)


def _as_time(seconds: float) -> str:
    """A length of time as it is written in YAML."""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"


def run_length(given: Given, plan: Plan) -> None:
    """Carry over the number of steps, or of samples, after which the run ends."""
    steps, samples = given.get("train_iters"), given.get("train_samples")
    if steps is not None:
        plan.put("trainer.max_steps", steps)
        plan.say("train_iters", steps, "Lightning's", "Trainer(max_steps=), which also ends the run")
    if samples is not None:
        size = full_batch(given)
        if steps is not None:
            raise MigrationError(f"train_iters={steps} and train_samples={samples}: give one.")
        if size is None:
            plan.say("train_samples", samples, "yours to do", "Trainer(max_steps=): samples / global batch")
        else:
            plan.put("trainer.max_steps", _steps(samples, size, growth(given)))
            plan.say("train_samples", samples, "Lightning's", "Trainer(max_steps=), batches that have that many")
    if (every := given.get("exit_interval")) is not None:
        _add_callback(plan, "lightning_megatron.callbacks.ExitInterval", {"steps": every})
        plan.say("exit_interval", every, "carried over", "lightning_megatron.callbacks.ExitInterval")


def _steps(samples: int, size: int, rule: BatchSizes | None) -> int:
    """Global batches that hold ``samples``."""
    steps = consumed = 0
    if rule is not None:
        while consumed < samples and rule.size(consumed, size) < size:
            consumed += rule.size(consumed, size)
            steps += 1
    return steps + math.ceil(max(samples - consumed, 0) / size)


def evaluation(given: Given, plan: Plan) -> None:
    """Carry over when and on how many batches the run evaluates."""
    every, batches = given.get("eval_interval"), given.get("eval_iters")
    if every is not None:
        plan.put("trainer.val_check_interval", every)
        plan.put("trainer.check_val_every_n_epoch", None)
        plan.say("eval_interval", every, "Lightning's", "Trainer(val_check_interval=, check_val_every_n_epoch=None)")
    if batches is not None:
        plan.put("trainer.limit_val_batches", batches)
        plan.put("trainer.limit_test_batches", batches)
        plan.say("eval_iters", batches, "Lightning's", "Trainer(limit_val_batches=, limit_test_batches=)")
    if given.get("full_validation"):
        plan.put("trainer.limit_val_batches", 1.0)
        plan.say("full_validation", True, "Lightning's", "Trainer(limit_val_batches=1.0)")


def checkpoints(given: Given, plan: Plan) -> None:
    """Carry over where and when the run saves checkpoints."""
    found = {name: given[name] for name in ("save", "save_interval", "no_save_optim") if given.get(name) is not None}
    if "save" not in found:
        for name, value in found.items():
            plan.say(name, value, "not needed", "Megatron saves only with save, the directory")
        return
    for name, value in found.items():
        plan.say(name, value, "Lightning's", "ModelCheckpoint among the Trainer's callbacks")
    arguments: dict[str, Any] = {"dirpath": found["save"], "save_last": True, "save_top_k": -1}
    if "save_interval" in found:
        arguments["every_n_train_steps"] = found["save_interval"]
    if found.get("no_save_optim"):
        arguments["save_weights_only"] = True
    _add_callback(plan, "ModelCheckpoint", arguments)
    _add_callback(plan, "lightning_megatron.callbacks.SaveAtEnd", {})
    plan.say("save", None, "carried over", "lightning_megatron.callbacks.SaveAtEnd: the last step is saved, too")


def loggers(given: Given, plan: Plan) -> None:
    """Carry over the directories and projects that the run logs to."""
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


def _add_callback(plan: Plan, class_path: str, arguments: dict[str, Any]) -> None:
    callbacks = plan.get("trainer.callbacks", [])
    plan.put("trainer.callbacks", [*callbacks, {"class_path": class_path, "init_args": arguments}])
