"""Settings of Megatron-LM that mean something only together: batches, schedules, positions, data, checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lightning_megatron.cli.migrate.plan import MigrationError, Plan
from lightning_megatron.cli.migrate.settings_table import CONFIG, DATA, MODULE, SCHEDULE, STRATEGY
from lightning_megatron.data import BatchSizes, BatchSizeSteps, RampUp

Given = Mapping[str, Any]
MODELS = {"gpt": ("GPTModule", "GPTSamples"), "bert": ("BertModule", "BertSamples"), "t5": ("T5Module", "T5Samples")}
# Megatron-LM's defaults, where they are not ours.
_THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_DEFAULTS = {"weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "sgd_momentum": 0.9}


def settle(given: Given, plan: Plan) -> None:
    """Carry over what goes together.

    Args:
        given: All settings, by Megatron's names, with their values read.
        plan: With what stands alone in it already.
    """
    for part in (_precision, _layers, _virtual_stages, _positions, _activation, _groups, _window, _batches, _data,
                 _documents, _length, _optimizer, _schedule, _evaluation, _checkpoints, _loggers):  # fmt: skip
        part(given, plan)


def _take(
    given: Given, plan: Plan, names: tuple[str, ...], says: str | Callable[[str], str], place: str | None = None
) -> dict[str, Any]:
    """Those of ``names`` that were given, each with its line."""
    found = {name: given[name] for name in names if given.get(name) is not None}
    for name, value in found.items():
        plan.say(name, value, "carried over", says if isinstance(says, str) else says(name), place)
    return found


def _precision(given: Given, plan: Plan) -> None:
    found = _take(given, plan, ("bf16", "fp16"), "Trainer(precision=)")
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


def _layers(given: Given, plan: Plan) -> None:
    """Layers and lengths of two stacks: a T5's, or of a model that nobody knows yet; others have one."""
    one_stack = any(str(plan.get("model.class_path")).endswith(MODELS[model][0]) for model in ("gpt", "bert"))
    if (layers := _depth(given)) is not None:
        plan.put(f"{CONFIG}.num_layers", layers)
    for name in ("num_layers", "encoder_num_layers", "decoder_num_layers", "decoder_seq_length"):
        value = given.get(name)
        if value is None:
            continue
        if one_stack and name.startswith("decoder"):
            plan.say(name, value, "not needed", "of T5 alone")
            continue
        place = "num_layers" if one_stack and name == "encoder_num_layers" else name
        plan.put(f"{CONFIG}.{place}", value)
        plan.say(name, value, "carried over", f"config.{place}", f"{CONFIG}.{place}")


def _depth(given: Given) -> int | None:
    """Layers, which of a T5 are the encoder's."""
    return given.get("num_layers") or given.get("encoder_num_layers")


def _virtual_stages(given: Given, plan: Plan) -> None:
    name = "num_layers_per_virtual_pipeline_stage"
    each = given.get(name)
    if each is None:
        return
    layers, pp = _depth(given), given.get("pipeline_model_parallel_size", 1)
    if layers is None:
        plan.say(name, each, "yours to do", f"MegatronStrategy(vp=): the model's layers / {pp} stages / {each}")
    elif layers % (pp * each):
        raise MigrationError(
            f"{name}={each}: {layers} layers on {pp} stages are no multiple of it. Use a number that divides"
            f" {layers // pp if layers % pp == 0 else layers}."
        )
    else:
        chunks = layers // pp // each
        plan.put(f"{STRATEGY}.vp", chunks if chunks > 1 else None)
        plan.say(name, each, "carried over", f"MegatronStrategy(vp={chunks}), chunks in place of layers; one is none")


def _positions(given: Given, plan: Plan) -> None:
    names = {"learned_absolute": "learned", "rope": "rope", "none": "none"}
    kind, place = given.get("position_embedding_type"), f"{CONFIG}.position_embedding"
    if kind is not None and kind not in names:
        plan.say("position_embedding_type", kind, "not here", f"positions are one of {', '.join(names)}")
    elif kind is not None:
        plan.put(place, names[kind])
        plan.say("position_embedding_type", kind, "carried over", "config.position_embedding", place)
    if given.get("use_rotary_position_embeddings") is not None:
        rotary = given["use_rotary_position_embeddings"]
        if rotary:
            plan.put(place, "rope")
        plan.say("use_rotary_position_embeddings", rotary, "carried over", "config.position_embedding", place)
    scaling = ("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor")
    found = _take(given, plan, scaling, "config.rope_scaling", f"{CONFIG}.rope_scaling")
    if found.get("use_rope_scaling"):
        # Megatron-LM's RotaryEmbedding: Llama 3.1's rule with its constants, the factor aside.
        plan.put(
            f"{CONFIG}.rope_scaling",
            {"rope_type": "llama3", "factor": given.get("rope_scaling_factor") or 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        )  # fmt: skip
    elif "rotary_seq_len_interpolation_factor" in found:
        factor = found["rotary_seq_len_interpolation_factor"]
        plan.put(f"{CONFIG}.rope_scaling", {"rope_type": "linear", "factor": factor})
    elif found:
        plan.take_back(f"{CONFIG}.rope_scaling", "not needed", "Megatron-LM looks at it only with use_rope_scaling")
    longest, length = given.get("max_position_embeddings"), given.get("seq_length") or given.get("encoder_seq_length")
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
    place = f"{CONFIG}.num_query_groups"
    found = _take(given, plan, ("group_query_attention", "num_query_groups"), "config.num_query_groups", place)
    if found.get("group_query_attention"):
        plan.put(f"{CONFIG}.num_query_groups", found.get("num_query_groups", 1))


def _window(given: Given, plan: Plan) -> None:
    window, skips = given.get("window_size"), given.get("window_attn_skip_freq")
    if window is None:
        if skips is not None:
            plan.say("window_attn_skip_freq", skips, "not needed", "Megatron-LM looks at it only with window_size")
        return
    parts = [part for word in window for part in word.strip("()").split(",") if part]
    if len(parts) != 2 or not all(part.lstrip("-").isdigit() for part in parts):
        raise MigrationError(f"window_size={' '.join(window)!r}: use LEFT,RIGHT, such as 128,0.")
    left, right = map(int, parts)
    if right not in (0, -1):
        plan.say("window_size", ",".join(parts), "not here", "a window looks back only: LEFT,0")
        return
    place = f"{CONFIG}.sliding_window"
    plan.put(place, left + 1)
    plan.say("window_size", ",".join(parts), "carried over", "config.sliding_window counts the token itself", place)
    if skips is not None and skips.isdigit() and (layers := _depth(given)) is not None:
        place, windowed = f"{CONFIG}.sliding_window_layers", [n for n in range(layers) if (n + 1) % int(skips)]
        plan.put(place, windowed)
        plan.say("window_attn_skip_freq", skips, "carried over", "config.sliding_window_layers", place)
    elif skips is not None:
        says = "config.sliding_window_layers: the numbers, from 0, of the layers that have the window"
        plan.say("window_attn_skip_freq", skips, "yours to do", says)


def growth(given: Given) -> BatchSizes | None:
    """How the global batch grows, where it does.

    Raises:
        MigrationError: What was written is no rule.
    """
    words = given.get("step_batch_size_schedule")
    if words is not None:
        return BatchSizeSteps(_sizes(words, given.get("seq_length") or given.get("encoder_seq_length") or 1))
    words = given.get("rampup_batch_size")
    if words is None:
        return None
    try:
        start, increment, samples = (int(word) for word in words)
    except ValueError:
        raise MigrationError(f"rampup_batch_size={' '.join(words)!r}: use START INCREMENT SAMPLES.") from None
    return RampUp(start, increment, samples)


def _sizes(words: list[str], tokens: int) -> dict[int, int]:
    """Global batches by the samples from which on they hold, of ``TOKENS:SIZE`` with K, M, B or T for thousands."""
    found = {}
    for entry in " ".join(words).replace(",", " ").strip("\"' ").split():
        number = re.fullmatch(r"([\d.]+)([KMBT]?):([\d.]+)([KMBT]?)", entry.upper())
        if number is None:
            raise MigrationError(
                f"step_batch_size_schedule={' '.join(words)!r}: use TOKENS:SIZE, such as 0:16 2.4B:320."
            )
        start, size = (int(float(number[n]) * _THOUSANDS[number[n + 1]]) for n in (1, 3))
        found[start // tokens] = size
    return dict(sorted(found.items()))


def _batches(given: Given, plan: Plan) -> None:
    rule, size, has_data = growth(given), _full_batch(given), given.get("data_path") is not None
    if size is None:
        if rule is not None:
            says = "it leads to a global batch, which nobody says: global_batch_size"
            plan.say("rampup_batch_size", " ".join(given["rampup_batch_size"]), "yours to do", says)
        if has_data:
            says = "MegatronDataModule(global_batch_size=) must be given: --micro-batch-size, --global-batch-size"
            plan.say("global_batch_size", None, "yours to do", says)
        return
    if has_data:
        plan.put(f"{DATA}.global_batch_size", size)
        plan.say("global_batch_size", size, "carried over", "MegatronDataModule(global_batch_size=)")
    else:
        plan.say("global_batch_size", size, "yours to do", "batch_size of the loader is this / data-parallel size")
    if rule is None:
        return
    name = "step_batch_size_schedule" if isinstance(rule, BatchSizeSteps) else "rampup_batch_size"
    made, arguments = type(rule).__name__, dict(vars(rule))
    if has_data:
        place = {"class_path": f"lightning_megatron.data.{made}", "init_args": arguments}
        plan.put(f"{DATA}.ramp_up", place)
        plan.say(name, " ".join(given[name]), "carried over", f"MegatronDataModule(ramp_up={made}(...))")
    else:
        says = f"batch_sampler=RampUpBatches(sampler, batch_size, {rule}) of the loader"
        plan.say(name, " ".join(given[name]), "yours to do", says)


def _full_batch(given: Given) -> int | None:
    """Samples of a global batch, once it grows no more.

    Raises:
        MigrationError: Two settings say different ones.
    """
    rule, size = growth(given), given.get("global_batch_size")
    if not isinstance(rule, BatchSizeSteps):
        return size
    full = list(rule.sizes.values())[-1]
    if size not in (None, full):
        raise MigrationError(f"global_batch_size={size} and step_batch_size_schedule, which ends at {full}: give one.")
    return full


def _data(given: Given, plan: Plan) -> None:
    paths = given.get("data_path")
    if paths is None:
        for name in plan.get(DATA, {}).copy():
            plan.take_back(
                f"{DATA}.{name}", "yours to do", f"{name} of the data module that you give; there is no data_path"
            )
        plan.run.pop("data", None)
        for name in ("mask_prob", "short_seq_prob"):
            if given.get(name) is not None:
                plan.say(name, given[name], "yours to do", "of the data module that you give; there is no data_path")
        return
    # As megatron-core's get_blend_from_list: an odd number of words are paths, whatever they look like.
    weighted = len(paths) % 2 == 0 and all(map(_is_number, paths[::2]))
    weights = [float(word) for word in paths[::2]] if weighted else None
    plan.put("data.class_path", "lightning_megatron.data.MegatronDataModule")
    plan.put(f"{DATA}.paths", paths[1::2] if weights else paths)
    if weights:
        plan.put(f"{DATA}.weights", weights)
    if given.get("seed"):
        plan.put(f"{DATA}.seed", given["seed"])
    module = str(plan.get("model.class_path", "GPTModule")).rpartition(".")[2]
    samples = next((samples for name, samples in MODELS.values() if name == module), "GPTSamples")
    options = {"seq_length": given.get("seq_length") or given.get("encoder_seq_length") or 1024}
    if samples == "T5Samples" and given.get("decoder_seq_length"):
        options["decoder_seq_length"] = given["decoder_seq_length"]
    if samples == "BertSamples":
        options["binary_head"] = plan.get(f"{CONFIG}.task", "pretraining") == "pretraining"
    masking = {"mask_prob": "masking_probability", "short_seq_prob": "short_sequence_probability"}
    for name, mine in masking.items():
        if given.get(name) is None:
            continue
        if samples == "GPTSamples":
            plan.say(name, given[name], "not needed", "of BERT and T5 alone")
        else:
            options[mine] = given[name]
            plan.say(name, given[name], "carried over", f"{samples}({mine}=)")
    plan.put(f"{DATA}.samples", {"class_path": f"lightning_megatron.data.{samples}", "init_args": options})
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
        size = _full_batch(given)
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


def _add_callback(plan: Plan, class_path: str, arguments: dict[str, Any]) -> None:
    callbacks = plan.get("trainer.callbacks", [])
    plan.put("trainer.callbacks", [*callbacks, {"class_path": class_path, "init_args": arguments}])


def _steps(samples: int, size: int, rule: BatchSizes | None) -> int:
    """Global batches that hold ``samples``."""
    steps = consumed = 0
    if rule is not None:
        while consumed < samples and rule.size(consumed, size) < size:
            consumed += rule.size(consumed, size)
            steps += 1
    return steps + math.ceil(max(samples - consumed, 0) / size)


def _optimizer(given: Given, plan: Plan) -> None:
    kind = given.get("optimizer")
    names = ("optimizer", "lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum")
    if not any(given.get(name) is not None for name in names):
        return
    _take(given, plan, names[1:], "the torch optimizer in model.init_args.optimizer")
    if kind in ("adam", "sgd"):
        plan.say("optimizer", kind, "carried over", "the torch optimizer in model.init_args.optimizer")
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
        "lr_wsd_decay_style": "wsd_decay_style",
    }  # fmt: skip
    ends = {"lr_warmup": "warmup_steps", "lr_decay": "decay_steps", "lr_wsd_decay": "wsd_decay_steps"}
    lengths = {f"{name}_iters": mine for name, mine in ends.items()}
    by_samples = {f"{name}_samples": mine for name, mine in ends.items()}
    given = _without_what_it_ignores(given, plan)
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
    whole_run = given.get("train_samples") if samples else given.get("train_iters")
    if not samples and growth(given) is not None and (size := _full_batch(given)) is not None:
        # Megatron-LM counts samples in any case: iterations of the schedule are so many full batches.
        samples, whole_run = True, whole_run and whole_run * size
        arguments |= {name: arguments[name] * size for name in ends.values() if arguments.get(name)}
        plan.say("schedule", None, "carried over", f"in samples, since batches grow: an iteration is {size}")
    if samples:
        arguments["unit"] = "samples"
        if whole_run:
            arguments.setdefault("decay_steps", whole_run)
    rises = arguments.get("weight_decay_style", "constant") != "constant"
    if rises and whole_run and arguments.get("decay_steps") not in (None, whole_run):
        arguments["weight_decay_steps"] = whole_run
    if arguments["style"] == "inverse-square-root" and not {"warmup_steps", "warmup_fraction"} & arguments.keys():
        says = "without a warm-up Megatron's rate falls with the samples of a batch, here with steps; give a warm-up"
        plan.say("lr_warmup", None, "yours to do", says)
    plan.put(f"{MODULE}.lr_schedule.class_path", "lightning_megatron.LRSchedule")
    plan.put(SCHEDULE, arguments)


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
    if given.get("full_validation"):
        plan.put("trainer.limit_val_batches", 1.0)
        plan.say("full_validation", True, "Lightning's", "Trainer(limit_val_batches=1.0)")


def _checkpoints(given: Given, plan: Plan) -> None:
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
