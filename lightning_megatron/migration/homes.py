"""Where each of Megatron-LM's settings lives here: one table, for its command line and for ``other_megatron_args``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_megatron.migration.plan import Fate
from lightning_megatron.migration.values import Reader, anything, number, one_of, text, truth, whole, words


@dataclass(frozen=True)
class Home:
    """Where a setting lives.

    Args:
        place: In the run, dotted; None where there is none, or where it is made from several settings.
        read: Its value from what was written.
        fate: What becomes of it.
        says: Where it is, or why it is nowhere.
        make: What stands at ``place``, of the value.
        flag: On the command line, whether no value follows.
    """

    place: str | None = None
    read: Reader = text
    fate: Fate = "carried over"
    says: str = ""
    make: Callable[[Any], Any] | None = None
    flag: bool = False

    def at(self, value: Any) -> Any:
        """What stands at ``place``."""
        return value if self.make is None else self.make(value)


STRATEGY = "trainer.strategy.init_args"
CONFIG = "model.init_args.config"
MODULE = "model.init_args"
DATA = "data.init_args"
SCHEDULE = "model.init_args.lr_schedule.init_args"
_EXPERTS = "experts and expert parallelism wait for their layers here"


def _strategy(name: str, read: Reader = whole, says: str = "") -> Home:
    return Home(f"{STRATEGY}.{name}", read, says=says or f"MegatronStrategy({name}=)", flag=read is truth)


def _config(name: str, read: Reader = whole, make: Any = None, flag: bool | None = None) -> Home:
    flag = read is truth if flag is None else flag
    return Home(f"{CONFIG}.{name}", read, says=f"config.{name}", make=make, flag=flag)


def extra(name: str, read: Reader = anything, make: Any = None, flag: bool = False) -> Home:
    """A field of megatron-core's that no argument here names."""
    return Home(f"{CONFIG}.extra.{name}", read, says=f"config.extra[{name!r}]", make=make, flag=flag)


def _trainer(name: str, read: Reader = whole, says: str = "", make: Any = None) -> Home:
    return Home(f"trainer.{name}", read, "Lightning's", says or f"Trainer({name}=)", make)


def _ddp(name: str, read: Reader = truth) -> Home:
    return Home(f"{STRATEGY}.ddp.{name}", read, says=f"MegatronStrategy(ddp=DistributedDataParallelConfig({name}=))",
                flag=read is truth)  # fmt: skip


def _dropped(says: str, flag: bool = True, read: Reader = anything) -> Home:
    return Home(None, read, "not needed", says, flag=flag)


def _by_hand(says: str, flag: bool = False, read: Reader = anything) -> Home:
    return Home(None, read, "yours to do", says, flag=flag)


def _absent(says: str, flag: bool = False, read: Reader = anything) -> Home:
    return Home(None, read, "not here", says, flag=flag)


def _together(read: Reader = text, flag: bool = False) -> Home:
    """One of several that are carried over together (``compounds.py``)."""
    return Home(None, read, flag=flag)


def _settings_of(side: str) -> Home:
    """Whose settings of optimizer and schedules hold at a resume; the checkpoint's where neither option is given."""
    return Home(
        f"{STRATEGY}.optimizer_settings",
        truth,
        says=f"MegatronStrategy(optimizer_settings={side!r})",
        make=lambda on: side if on else "checkpoint",
        flag=True,
    )


_SPLIT_TOKENIZERS = "data.init_args.tokenizer takes a tokenizer.json or a directory of transformers"
_FSDP = "FSDP is Lightning's, Trainer(strategy='fsdp'); here the optimizer is sharded"
_NO_KERNEL = "kernels here are PyTorch's, or Transformer Engine's where layers='transformer_engine'"
_MEASURED = "lightning_megatron.callbacks show it"

HOMES: dict[str, Home] = {
    # parallelism
    "tensor_model_parallel_size": _strategy("tp"),
    "pipeline_model_parallel_size": _strategy("pp"),
    "context_parallel_size": _strategy("cp"),
    "expert_model_parallel_size": _strategy("ep"),
    "expert_tensor_parallel_size": _strategy("etp"),
    "sequence_parallel": _strategy("sequence_parallel", truth),
    "num_layers_per_virtual_pipeline_stage": _together(whole),
    "num_virtual_stages_per_pipeline_rank": _strategy("vp"),
    "pipeline_model_parallel_split_rank": _strategy("pipeline_split_rank"),
    "decoder_first_pipeline_num_layers": extra("num_layers_in_first_pipeline_stage", whole),
    "decoder_last_pipeline_num_layers": extra("num_layers_in_last_pipeline_stage", whole),
    "use_distributed_optimizer": _strategy("distributed_optimizer", truth),
    "overlap_grad_reduce": _ddp("overlap_grad_reduce"),
    "overlap_param_gather": _ddp("overlap_param_gather"),
    "ddp_bucket_size": _ddp("bucket_size", whole),
    "check_for_nan_in_loss_and_grad": _strategy("check_loss", truth),
    "no_check_for_nan_in_loss_and_grad": Home(
        f"{STRATEGY}.check_loss", truth, says="MegatronStrategy(check_loss=False)", make=lambda on: not on, flag=True
    ),
    "distributed_backend": _strategy("process_group_backend", one_of("nccl", "gloo")),
    "distributed_timeout_minutes": Home(
        f"{STRATEGY}.timeout",
        number,
        says="MegatronStrategy(timeout=)",
        make=lambda minutes: f"{int(minutes // 60)}:{int(minutes % 60):02d}:{int(minutes * 60 % 60):02d}",
    ),
    "recompute_activations": Home(
        f"{STRATEGY}.recompute",
        truth,
        says="MegatronStrategy(recompute='selective')",
        flag=True,
        make=lambda on: "selective" if on else None,
    ),
    "recompute_granularity": _strategy("recompute", one_of("full", "selective")),
    "recompute_method": extra("recompute_method", one_of("uniform", "block")),
    "recompute_num_layers": extra("recompute_num_layers", whole),
    # batches
    "micro_batch_size": _strategy("micro_batch_size"),
    "global_batch_size": _together(whole),
    "rampup_batch_size": _together(words),
    "decrease_batch_size_if_needed": _absent("a batch that does not divide is refused with sizes that do", True),
    # the model
    "num_layers": _config("num_layers"),
    "encoder_num_layers": _config("encoder_num_layers"),
    "decoder_num_layers": _config("decoder_num_layers"),
    "hidden_size": _config("hidden_size"),
    "ffn_hidden_size": _config("ffn_hidden_size"),
    "num_attention_heads": _config("num_attention_heads"),
    "kv_channels": _config("kv_channels"),
    "group_query_attention": _together(truth, True),
    "num_query_groups": _together(whole),
    "seq_length": _config("seq_length"),
    "encoder_seq_length": _config("seq_length"),
    "decoder_seq_length": _config("decoder_seq_length"),
    "max_position_embeddings": _together(whole),
    "vocab_size": _config("vocab_size"),
    "make_vocab_size_divisible_by": _config("make_vocab_size_divisible_by"),
    "position_embedding_type": _together(one_of("learned_absolute", "rope", "none", "relative", "mrope", "yarn")),
    "use_rotary_position_embeddings": _together(truth, True),
    "rotary_base": _config("rotary_base", number),
    "rotary_percent": _config("rotary_percent", number),
    "use_rope_scaling": _together(truth, True),
    "rope_scaling_factor": _together(number),
    "normalization": _config("normalization", one_of("LayerNorm", "RMSNorm")),
    "norm_epsilon": _config("layernorm_epsilon", number),
    "layernorm_epsilon": _config("layernorm_epsilon", number),
    "apply_layernorm_1p": extra("layernorm_zero_centered_gamma", truth, flag=True),
    "qk_layernorm": extra("qk_layernorm", truth, flag=True),
    "swiglu": _together(truth, True),
    "squared_relu": _together(truth, True),
    "openai_gelu": _together(truth, True),
    "disable_bias_linear": _config("bias", truth, lambda off: not off),
    "add_bias_linear": _config("bias", truth),
    "add_qkv_bias": _config("qkv_bias", truth),
    "untie_embeddings_and_output_weights": _config("tie_embeddings", truth, lambda untied: not untied),
    "hidden_dropout": _config("hidden_dropout", number),
    "attention_dropout": _config("attention_dropout", number),
    "init_method_std": _config("init_method_std", number),
    "window_size": _together(words),
    "transformer_impl": _config(
        "layers", one_of("local", "transformer_engine"), lambda kind: "torch" if kind == "local" else kind
    ),
    "attention_softmax_in_fp32": extra("attention_softmax_in_fp32", truth, flag=True),
    "apply_query_key_layer_scaling": extra("apply_query_key_layer_scaling", truth, flag=True),
    "attention_backend": _dropped("PyTorch chooses its attention kernel, Transformer Engine its own", False),
    "fp32_residual_connection": extra("fp32_residual_connection", truth, flag=True),
    "clone_scatter_output_in_embedding": extra("clone_scatter_output_in_embedding", truth, flag=True),
    "num_labels": _config("num_labels"),
    # losses
    "calculate_per_token_loss": Home(
        f"{MODULE}.loss_reduction",
        truth,
        says="the module's loss_reduction: 'token', or 'micro_batch' for false",
        make=lambda per_token: "token" if per_token else "micro_batch",
        flag=True,
    ),
    "eod_mask_loss": _together(truth, True),
    "reset_position_ids": _together(truth, True),
    "reset_attention_mask": _together(truth, True),
    "eos_token_id": Home(f"{MODULE}.eod_id", whole, says="GPTModule(eod_id=)"),
    # how long, and how often it is looked at
    "train_iters": _together(whole),
    "train_samples": _together(whole),
    "exit_duration_in_mins": _trainer(
        "max_time", whole, make=lambda minutes: f"{minutes // 1440:02d}:{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"
    ),
    "exit_interval": _trainer("max_steps", says="Trainer(max_steps=): the run ends and saves there"),
    "exit_signal_handler": _dropped("SIGTERM ends the step, saves and stops"),
    "eval_interval": _together(whole),
    "eval_iters": _together(whole),
    "log_interval": _trainer("log_every_n_steps"),
    "seed": Home("seed_everything", whole, "Lightning's", "seed_everything"),
    # optimizer and schedules
    "optimizer": _together(one_of("adam", "sgd")),
    "lr": _together(number),
    "weight_decay": _together(number),
    "adam_beta1": _together(number),
    "adam_beta2": _together(number),
    "adam_eps": _together(number),
    "sgd_momentum": _together(number),
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
    "min_lr": _together(number),
    "weight_decay_incr_style": _together(one_of("constant", "linear", "cosine")),
    "start_weight_decay": _together(number),
    "end_weight_decay": _together(number),
    "override_opt_param_scheduler": _settings_of("program"),
    "use_checkpoint_opt_param_scheduler": _settings_of("checkpoint"),
    "decoupled_lr": _by_hand("ParameterGroups(scale_lr=['embedding.*', 'output_layer.*'], lr_mult=decoupled_lr / lr)"),
    "optimizer_cpu_offload": _absent("optimizer state stays on the device; more replicas share it out", True, truth),
    "overlap_cpu_optimizer_d2h_h2d": _absent("goes with optimizer_cpu_offload", True, truth),
    "use_precision_aware_optimizer": _absent("main weights and Adam's state are fp32", True, truth),
    # precision
    "bf16": _together(truth, True),
    "fp16": _together(truth, True),
    "initial_loss_scale": _strategy("initial_loss_scale", number),
    "loss_scale": _absent("the loss scale is dynamic; a constant one has no home", False, number),
    "loss_scale_window": _dropped("the loss scale doubles after 1,000 steps", False, number),
    "hysteresis": _dropped("two overflows, as in Megatron", False, whole),
    "accumulate_allreduce_grads_in_fp32": _dropped("so it is with precision 'bf16-mixed' and '16-mixed'"),
    "grad_reduce_in_bf16": _by_hand("precision='bf16-true' keeps and reduces gradients in bf16", True),
    "fp8_format": _absent("no fp8 yet: precision is one of 32-true, bf16-mixed, bf16-true, 16-mixed"),
    # data
    "data_path": _together(words),
    "split": Home(f"{DATA}.split", text, says="MegatronDataModule(split=)"),
    "data_cache_path": Home(f"{DATA}.cache_dir", text, says="MegatronDataModule(cache_dir=)"),
    "num_workers": Home(f"{DATA}.num_workers", whole, "Lightning's", "of the data module's loaders"),
    "tokenizer_model": Home(f"{DATA}.tokenizer", text, says="MegatronDataModule(tokenizer=)"),
    "tokenizer_type": _dropped(_SPLIT_TOKENIZERS, False),
    "vocab_file": _by_hand(_SPLIT_TOKENIZERS),
    "merge_file": _by_hand(_SPLIT_TOKENIZERS),
    "train_data_path": _by_hand("MegatronDataModule cuts a split; for files of their own write a LightningDataModule"),
    "valid_data_path": _by_hand("see train_data_path"),
    "test_data_path": _by_hand("see train_data_path"),
    "mock_data": _by_hand("lightning_megatron.data.TextDataModule trains on text that is on every machine", True),
    "dataloader_type": _dropped("loaders are PyTorch's, on every rank", False),
    "consumed_samples": _dropped("a resumed run knows its place in the data", False),
    # checkpoints
    "save": _together(),
    "save_interval": _together(whole),
    "load": _by_hand(
        "fit --ckpt_path PATH, of this tool's checkpoints; `lightning-megatron import` takes transformers'"
    ),
    "finetune": _by_hand("load_weights, or from_pretrained: weights without optimizer or place in the data", True),
    "no_load_optim": _by_hand("module.load_weights(path) takes weights alone", True, truth),
    "no_load_rng": _by_hand("module.load_weights(path) takes weights alone", True, truth),
    "no_save_optim": _together(truth, True),
    "no_save_rng": _dropped("random states are small and always saved", True, truth),
    "async_save": _strategy("async_save", truth),
    "pretrained_checkpoint": _by_hand("from_pretrained, or load_weights"),
    # what is seen
    "tensorboard_dir": _together(),
    "wandb_project": _together(),
    "wandb_exp_name": _together(),
    "wandb_save_dir": _together(),
    "log_throughput": _dropped(_MEASURED),
    "log_params_norm": _dropped(_MEASURED),
    "log_num_zeros_in_grad": _dropped(_MEASURED),
    "log_memory_to_tensorboard": _dropped(_MEASURED),
    "log_validation_ppl_to_tensorboard": _dropped("lightning_megatron.callbacks.Perplexity"),
    "log_timers_to_tensorboard": _dropped(_MEASURED),
    "log_progress": _dropped(_MEASURED),
    "log_loss_scale_to_tensorboard": _dropped("loss_scale is logged with precision '16-mixed'"),
    "log_world_size_to_tensorboard": _dropped("the world is in the logger's hyperparameters if you put it there"),
    "timing_log_level": _dropped(_MEASURED, False),
    "profile": _by_hand("Trainer(profiler=), as in Lightning", True),
    "profile_step_start": _by_hand("Trainer(profiler=), as in Lightning"),
    "profile_step_end": _by_hand("Trainer(profiler=), as in Lightning"),
    # experts
    "num_experts": _absent(_EXPERTS),
    "moe_grouped_gemm": _absent(_EXPERTS, True),
    "moe_router_topk": _absent(_EXPERTS),
    "moe_router_load_balancing_type": _absent(_EXPERTS),
    "moe_aux_loss_coeff": _absent(_EXPERTS),
    "moe_z_loss_coeff": _absent(_EXPERTS),
    "moe_token_dispatcher_type": _absent(_EXPERTS),
    "moe_ffn_hidden_size": _absent(_EXPERTS),
    "moe_shared_expert_intermediate_size": _absent(_EXPERTS),
    "moe_layer_freq": _absent(_EXPERTS),
    "moe_permute_fusion": _absent(_EXPERTS, True),
    "mtp_num_layers": _absent("multi-token prediction has no layers here"),
    "multi_latent_attention": _absent("multi-latent attention has no layers here", True),
    # what is otherwise here, or never was needed
    "use_flash_attn": _dropped("PyTorch's attention is flash attention where it can be"),
    "use_mcore_models": _dropped("models are megatron-core's"),
    "use_legacy_models": _absent("models are megatron-core's", True),
    "use_cpu_initialization": _dropped("a weight follows from the seed and its name, whatever the layout"),
    "no_gradient_accumulation_fusion": _dropped(_NO_KERNEL),
    "no_masked_softmax_fusion": _dropped(_NO_KERNEL),
    "no_bias_gelu_fusion": _dropped(_NO_KERNEL),
    "no_bias_swiglu_fusion": _dropped(_NO_KERNEL),
    "no_bias_dropout_fusion": _dropped(_NO_KERNEL),
    "no_rope_fusion": _dropped(_NO_KERNEL),
    "no_persist_layer_norm": _dropped(_NO_KERNEL),
    "cross_entropy_loss_fusion": _dropped(_NO_KERNEL),
    "tp_comm_overlap": extra("tp_comm_overlap", truth, flag=True),
    "no_async_tensor_model_parallel_allreduce": _dropped("megatron-core decides"),
    "use_dist_ckpt": _dropped("checkpoints are torch_dist's"),
    "ckpt_format": _dropped("checkpoints are torch_dist's", False),
    "dist_ckpt_strictness": _dropped("`strict_loading` of the module says it", False),
    "auto_detect_ckpt_format": _dropped("there is one format"),
    "use_checkpoint_args": _dropped("load_from_checkpoint has the module's arguments"),
    "local_rank": _dropped("Lightning numbers the ranks", False),
    "distribute_saved_activations": extra("distribute_saved_activations", truth, flag=True),
    "use_custom_fsdp": _absent(
        "FSDP is Lightning's: Trainer(strategy='fsdp'); here the optimizer is sharded", True, truth
    ),
    "use_megatron_fsdp": _absent(
        "FSDP is Lightning's: Trainer(strategy='fsdp'); here the optimizer is sharded", True, truth
    ),
    "use_torch_fsdp2": _absent(
        "FSDP is Lightning's: Trainer(strategy='fsdp'); here the optimizer is sharded", True, truth
    ),
    "data_parallel_random_init": _absent("replicas start alike", True),
    "bert_no_binary_head": Home(
        f"{CONFIG}.task",
        truth,
        says="config.task: 'masked_lm' has no second head",
        flag=True,
        make=lambda off: "masked_lm",
    ),
    "mask_prob": _by_hand("BertSamples(masking_probability=) of the data module's samples"),
    "short_seq_prob": _by_hand("BertSamples(short_sequence_probability=)"),
}
