"""The table of Megatron-LM's settings: where each of them lives here.

Those that have a place in the run stand below, room by room. The others are rows of ``elsewhere.tsv``: what they take
on the command line, Megatron-LM's default where it asks for nothing, what becomes of them, and why.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, get_args

from lightning_megatron.cli.migrate.plan import Fate
from lightning_megatron.cli.migrate.values import (
    Reader,
    anything,
    number,
    numbers,
    one_of,
    shares,
    text,
    truth,
    whole,
    words,
)

Takes = Literal["flag", "value", "list", "switch"]


@dataclass(frozen=True)
class Destination:
    """The place of a setting in the run.

    Args:
        place: The setting's dotted place in the run; None if it has none, or shares one with other settings.
        read: Reads its value from the text that was written.
        fate: The outcome for the setting.
        says: The text about the setting: its place in the run, or why it has none.
        make: Makes what stands at ``place`` from the value; None puts the value itself.
        takes: What it takes on the command line: no value ("flag"), one, several ("list"), or an optional true or false
            ("switch"). None: as ``read`` says.
        usual: Megatron-LM's default, at which a setting that has no place asks for nothing.
    """

    place: str | None = None
    read: Reader = text
    fate: Fate = "carried over"
    says: str = ""
    make: Callable[[Any], Any] | None = None
    takes: Takes | None = None
    usual: str | None = None

    @property
    def form(self) -> Takes:
        """The form of the setting's value on the command line."""
        kinds: dict[Reader, Takes] = {truth: "flag", words: "list", numbers: "list"}
        return self.takes or kinds.get(self.read, "value")

    @property
    def flag(self) -> bool:
        """Whether the setting is a switch, which is on or off."""
        return self.form in ("flag", "switch")

    def asks_for_nothing(self, value: Any) -> bool:
        """Whether a setting without a place is off, or as Megatron-LM has it where nothing is said."""
        return self.place is None and (value is False or (self.usual is not None and _equal(value, self.usual)))

    def at(self, value: Any) -> Any:
        """What stands at ``place``."""
        return value if self.make is None else self.make(value)


# A model's module and its samples of indexed data.
MODELS = {"gpt": ("GPTModule", "GPTSamples"), "bert": ("BertModule", "BertSamples"), "t5": ("T5Module", "T5Samples")}
STRATEGY = "trainer.strategy.init_args"
CHECKPOINTING = f"{STRATEGY}.checkpointing"
CONFIG = "model.init_args.config"
MODULE = "model.init_args"
DATA = "data.init_args"
SCHEDULE = "model.init_args.lr_schedule.init_args"


def _strategy(name: str, read: Reader = whole, says: str = "") -> Destination:
    return Destination(f"{STRATEGY}.{name}", read, says=says or f"MegatronStrategy({name}=)")


def _config(name: str, read: Reader = whole, make: Any = None) -> Destination:
    return Destination(f"{CONFIG}.{name}", read, says=f"config.{name}", make=make)


def extra(name: str, read: Reader = anything, make: Any = None) -> Destination:
    """A field of megatron-core's that no argument here names."""
    return Destination(f"{CONFIG}.extra.{name}", read, says=f"config.extra[{name!r}]", make=make)


def _trainer(name: str, read: Reader = whole, says: str = "", make: Any = None) -> Destination:
    return Destination(f"trainer.{name}", read, "Lightning's", says or f"Trainer({name}=)", make)


def _ddp(name: str, read: Reader = truth) -> Destination:
    return Destination(
        f"{STRATEGY}.ddp.{name}", read, says=f"MegatronStrategy(ddp=DistributedDataParallelConfig({name}=))"
    )


def _together(read: Reader = text) -> Destination:
    """A setting that is carried over together with others of its subject."""
    return Destination(None, read)


def _settings_of(side: str) -> Destination:
    """Decide whether the checkpoint's settings hold at a resume (also without either option), or the program's."""
    return Destination(
        f"{CHECKPOINTING}.optimizer_settings",
        truth,
        says=f"Checkpointing(optimizer_settings={side!r})",
        make=lambda on: side if on else "checkpoint",
    )


def _on_nonfinite(on: str, off: str) -> Destination:
    """What happens at a loss or gradient that is not finite, where the setting is on and where it is off."""
    place = f"{STRATEGY}.on_nonfinite"
    return Destination(place, truth, says="MegatronStrategy(on_nonfinite=)", make=lambda value: on if value else off)


def _opposite(value: bool) -> bool:
    return not value


def _no_padding(value: bool) -> int:
    return 1 if value else 128


def _elsewhere() -> Iterator[tuple[str, Destination]]:
    """Settings without a place in the run: the rows of ``elsewhere.tsv``, each with what becomes of it, and why."""
    rows = resources.files(__package__).joinpath("elsewhere.tsv").read_text(encoding="utf-8").splitlines()
    for option, takes, usual, fate, says in csv.reader((row for row in rows if row[:1] != "#"), delimiter="\t"):
        assert takes in get_args(Takes), option
        assert fate in get_args(Fate), option
        read = truth if takes == "flag" else anything
        yield name_of(option), Destination(None, read, fate, says, takes=takes, usual=usual or None)  # type: ignore[arg-type]


def name_of(option: str) -> str:
    """The setting's name, from its command-line option."""
    return option.removeprefix("--").replace("-", "_")


def option_of(name: str) -> str:
    """The setting's command-line option, from its name."""
    return f"--{name.replace('_', '-')}"


def _equal(value: Any, usual: str) -> bool:
    try:
        return float(value) == float(usual)
    except (TypeError, ValueError):
        return str(value).lower() == usual.lower()


_PLACED: dict[str, Destination] = {
    # parallelism
    "tensor_model_parallel_size": _strategy("tp"),
    "pipeline_model_parallel_size": _strategy("pp"),
    "context_parallel_size": _strategy("cp"),
    "cp_comm_type": _together(words),
    "expert_model_parallel_size": _strategy("ep"),
    "expert_tensor_parallel_size": _strategy("etp"),
    "sequence_parallel": _strategy("sequence_parallel", truth),
    "num_layers_per_virtual_pipeline_stage": _together(whole),
    "num_virtual_stages_per_pipeline_rank": Destination(
        f"{STRATEGY}.vp",
        whole,
        says="MegatronStrategy(vp=); one is none",
        make=lambda chunks: chunks if chunks > 1 else None,
    ),
    "pipeline_model_parallel_split_rank": _strategy("pipeline_split_rank"),
    "decoder_first_pipeline_num_layers": _together(whole),
    "decoder_last_pipeline_num_layers": _together(whole),
    "account_for_embedding_in_pipeline_split": _together(truth),
    "account_for_loss_in_pipeline_split": _together(truth),
    "pipeline_model_parallel_layout": _together(text),
    "use_distributed_optimizer": _strategy("distributed_optimizer", truth),
    "overlap_grad_reduce": _ddp("overlap_grad_reduce"),
    "overlap_param_gather": _ddp("overlap_param_gather"),
    "ddp_bucket_size": _ddp("bucket_size", whole),
    "ddp_average_in_collective": _ddp("average_in_collective"),
    "ddp_pad_buckets_for_high_nccl_busbw": _ddp("pad_buckets_for_high_nccl_busbw"),
    "ddp_reduce_scatter_with_fp32_accumulation": _ddp("reduce_scatter_with_fp32_accumulation"),
    "check_for_nan_in_loss_and_grad": _on_nonfinite("raise", "ignore"),
    "no_check_for_nan_in_loss_and_grad": _on_nonfinite("ignore", "raise"),
    "distributed_backend": _strategy("process_group_backend", one_of("nccl", "gloo")),
    "distributed_timeout_minutes": _together(number),
    "distributed_timeout_seconds_after_init": _together(number),
    "num_experts": _together(whole),
    "moe_router_topk": _together(whole),
    "moe_ffn_hidden_size": _together(whole),
    "moe_shared_expert_intermediate_size": _together(whole),
    "moe_router_score_function": _together(one_of("softmax", "sigmoid")),
    "moe_router_pre_softmax": _together(truth),
    "moe_router_load_balancing_type": _together(words),
    "moe_router_enable_expert_bias": _together(truth),
    "moe_router_bias_update_rate": _together(number),
    "moe_router_dtype": _together(text),
    "moe_router_num_groups": _together(whole),
    "moe_router_group_topk": _together(whole),
    "moe_router_topk_scaling_factor": _together(number),
    "moe_router_force_load_balancing": _together(truth),
    "moe_aux_loss_coeff": _together(numbers),
    "moe_z_loss_coeff": _together(number),
    "moe_input_jitter_eps": _together(number),
    "moe_expert_capacity_factor": _together(number),
    "moe_token_drop_policy": _together(one_of("probs", "position")),
    "moe_pad_expert_input_to_capacity": _together(truth),
    "moe_layer_freq": _together(text),
    "moe_shared_expert_gate": _together(truth),
    "moe_shared_expert_overlap": _together(truth),
    "moe_token_dispatcher_type": _together(one_of("allgather", "alltoall", "flex")),
    "recompute_activations": _together(truth),
    "recompute_granularity": _together(one_of("full", "selective")),
    "recompute_method": _together(one_of("uniform", "block")),
    "recompute_num_layers": _together(whole),
    "recompute_modules": _together(words),
    # batches
    "micro_batch_size": _strategy("micro_batch_size"),
    "global_batch_size": _together(whole),
    "rampup_batch_size": _together(words),
    "step_batch_size_schedule": _together(words),
    # the model
    "num_layers": _together(whole),
    "encoder_num_layers": _together(whole),
    "decoder_num_layers": _together(whole),
    "hidden_size": _config("hidden_size"),
    "ffn_hidden_size": _config("ffn_hidden_size"),
    "num_attention_heads": _config("num_attention_heads"),
    "kv_channels": _config("kv_channels"),
    "group_query_attention": _together(truth),
    "num_query_groups": _together(whole),
    "seq_length": _config("seq_length"),
    "encoder_seq_length": _config("seq_length"),
    "decoder_seq_length": _together(whole),
    "max_position_embeddings": _together(whole),
    "vocab_size": _config("vocab_size"),
    "make_vocab_size_divisible_by": _config("make_vocab_size_divisible_by"),
    "no_pad_vocab_size": _config("make_vocab_size_divisible_by", truth, _no_padding),
    "disable_pad_vocab_size": _config("make_vocab_size_divisible_by", truth, _no_padding),
    "position_embedding_type": _together(one_of("learned_absolute", "rope", "none", "relative", "mrope", "yarn")),
    "use_rotary_position_embeddings": _together(truth),
    "rotary_base": _config("rotary_base", number),
    "rotary_percent": _config("rotary_percent", number),
    "use_rope_scaling": _together(truth),
    "rope_scaling_factor": _together(number),
    "rotary_seq_len_interpolation_factor": _together(number),
    "normalization": _config("normalization", one_of("LayerNorm", "RMSNorm")),
    "norm_epsilon": _config("layernorm_epsilon", number),
    "layernorm_epsilon": _config("layernorm_epsilon", number),
    "apply_layernorm_1p": extra("layernorm_zero_centered_gamma", truth),
    "multi_latent_attention": _together(truth),
    "q_lora_rank": _together(whole),
    "kv_lora_rank": _together(whole),
    "qk_head_dim": _together(whole),
    "qk_pos_emb_head_dim": _together(whole),
    "v_head_dim": _together(whole),
    "rope_type": _together(text),
    "rotary_scaling_factor": _together(number),
    "mscale": _together(number),
    "mscale_all_dim": _together(number),
    "qk_layernorm": extra("qk_layernorm", truth),
    "swiglu": _together(truth),
    "squared_relu": _together(truth),
    "openai_gelu": _together(truth),
    "disable_bias_linear": _config("bias", truth, _opposite),
    "add_bias_linear": _config("bias", truth),
    "add_qkv_bias": _config("qkv_bias", truth),
    "untie_embeddings_and_output_weights": _config("tie_embeddings", truth, _opposite),
    "mtp_num_layers": _config("mtp"),
    "mtp_loss_scaling_factor": _config("mtp_weight", number),
    "hidden_dropout": _config("hidden_dropout", number),
    "attention_dropout": _config("attention_dropout", number),
    "init_method_std": _config("init_method_std", number),
    "window_size": _together(words),
    "window_attn_skip_freq": _together(text),
    "transformer_impl": _config(
        "layers", one_of("local", "transformer_engine"), lambda kind: "torch" if kind == "local" else kind
    ),
    "attention_softmax_in_fp32": extra("attention_softmax_in_fp32", truth),
    "apply_query_key_layer_scaling": extra("apply_query_key_layer_scaling", truth),
    "fp32_residual_connection": extra("fp32_residual_connection", truth),
    "clone_scatter_output_in_embedding": extra("clone_scatter_output_in_embedding", truth),
    "no_clone_scatter_output_in_embedding": extra("clone_scatter_output_in_embedding", truth, _opposite),
    "disable_clone_scatter_output_in_embedding": extra("clone_scatter_output_in_embedding", truth, _opposite),
    "num_labels": _config("num_labels"),
    "bert_no_binary_head": Destination(
        f"{CONFIG}.task",
        truth,
        says="config.task: 'masked_lm' has no second head",
        make=lambda off: "masked_lm",
    ),
    "relative_attention_num_buckets": _config("relative_attention_num_buckets"),
    "relative_attention_max_distance": _config("relative_attention_max_distance"),
    # losses
    "calculate_per_token_loss": Destination(
        f"{MODULE}.loss_reduction",
        truth,
        says="the module's loss_reduction: 'token', or 'micro_batch' for false",
        make=lambda per_token: "token" if per_token else "micro_batch",
    ),
    "eod_mask_loss": _together(truth),
    "reset_position_ids": _together(truth),
    "reset_attention_mask": _together(truth),
    "eos_token_id": Destination(f"{MODULE}.eod_id", whole, says="GPTModule(eod_id=)"),
    # how long, and how often it is looked at
    "train_iters": _together(whole),
    "train_samples": _together(whole),
    "exit_duration_in_mins": _trainer(
        "max_time", whole, make=lambda minutes: f"{minutes // 1440:02d}:{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"
    ),
    "exit_interval": _together(whole),
    "eval_interval": _together(whole),
    "eval_iters": _together(whole),
    "full_validation": _together(truth),
    "log_interval": _trainer("log_every_n_steps"),
    "seed": Destination("seed_everything", whole, "Lightning's", "seed_everything, and the data module's seed"),
    "deterministic_mode": _trainer("deterministic", truth),
    # optimizer and schedules
    "optimizer": _together(text),
    "lr": _together(number),
    "weight_decay": _together(number),
    "adam_beta1": _together(number),
    "adam_beta2": _together(number),
    "adam_eps": _together(number),
    "sgd_momentum": _together(number),
    "optimizer_cpu_offload": _together(truth),
    "exp_avg_dtype": _together(text),
    "exp_avg_sq_dtype": _together(text),
    "clip_grad": _trainer("gradient_clip_val", number, make=lambda value: value or None),
    "lr_decay_style": _together(one_of("constant", "linear", "cosine", "inverse-square-root", "WSD")),
    "lr_decay_iters": _together(whole),
    "lr_decay_samples": _together(whole),
    "lr_warmup_iters": _together(whole),
    "lr_warmup_samples": _together(whole),
    "lr_warmup_fraction": _together(number),
    "lr_warmup_init": _together(number),
    "lr_wsd_decay_style": _together(one_of("exponential", "linear", "cosine", "minus_sqrt")),
    "lr_wsd_decay_iters": _together(whole),
    "lr_wsd_decay_samples": _together(whole),
    "min_lr": _together(number),
    "weight_decay_incr_style": _together(one_of("constant", "linear", "cosine")),
    "start_weight_decay": _together(number),
    "end_weight_decay": _together(number),
    "override_opt_param_scheduler": _settings_of("program"),
    "use_checkpoint_opt_param_scheduler": _settings_of("checkpoint"),
    # precision
    "bf16": _together(truth),
    "fp16": _together(truth),
    "initial_loss_scale": _together(number),
    # data
    "data_path": _together(words),
    "split": Destination(f"{DATA}.split", shares, says="MegatronDataModule(split=)"),
    "data_cache_path": Destination(f"{DATA}.cache_dir", text, says="MegatronDataModule(cache_dir=)"),
    "num_workers": Destination(f"{DATA}.num_workers", whole, "Lightning's", "of the data module's loaders"),
    "tokenizer_model": Destination(f"{DATA}.tokenizer", text, says="MegatronDataModule(tokenizer=)"),
    "mask_prob": _together(number),
    "short_seq_prob": _together(number),
    # checkpoints
    "save": _together(),
    "save_interval": _together(whole),
    "persistent_save_interval": _together(whole),
    "no_save_optim": _together(truth),
    "async_save": Destination(f"{CHECKPOINTING}.async_save", truth, says="Checkpointing(async_save=)"),
    # what is seen
    "tensorboard_dir": _together(),
    "wandb_project": _together(),
    "wandb_exp_name": _together(),
    "wandb_save_dir": _together(),
    # what megatron-core takes by its own names
    "distribute_saved_activations": extra("distribute_saved_activations", truth),
    "microbatch_group_size_per_virtual_pipeline_stage": extra("microbatch_group_size_per_vp_stage", whole),
    "overlap_p2p_communication_warmup_flush": extra("overlap_p2p_comm_warmup_flush", truth),
    "rotary_interleaved": extra("rotary_interleaved", truth),
    "glu_linear_offset": extra("glu_linear_offset", number),
    "activation_func_clamp_value": extra("activation_func_clamp_value", number),
    "embedding_init_method_std": extra("embedding_init_method_std", number),
}

DESTINATIONS: dict[str, Destination] = {**dict(_elsewhere()), **_PLACED}


def whereabouts(name: str, owner: str) -> str:
    """Say where a setting of Megatron-LM lives here; empty if there is no setting of that name.

    Args:
        name: The setting's name, as in ``tensor_model_parallel_size``.
        owner: The class that was given it as an argument; places are told the same for all.
    """
    found = DESTINATIONS.get(name)
    if found is None or not found.says:
        return ""
    return f"Megatron-LM's setting is {found.says} here" if found.place else f"{found.fate}: {found.says}"
