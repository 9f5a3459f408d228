"""What Megatron-LM, accelerate, NeMo, transformers, peft, DeepSpeed and others call the arguments of this package.

The names are hints for error messages, and no argument is accepted by them. Imports nothing.
"""

from __future__ import annotations

# What others call the values of an argument, by its name: {theirs: ours}.
VALUE_NAMES: dict[str, dict[str, str]] = {
    "cp_comm": {
        "p2p": "ring", "allgather": "all_gather", "a2a": "all_to_all", "alltoall": "all_to_all", "ulysses": "all_to_all"
    },
    "precision": {
        "fp8": "transformer-engine", "fp16": "16-mixed", "float16": "16-mixed", "half": "16-mixed",
        "bfloat16": "bf16-mixed", "fp32": "32-true", "float32": "32-true", "float": "32-true", "no": "32-true"
    },
}  # fmt: skip

# By the class that has an argument, and the argument: what others call it. Classes of a kind share a group.
OTHERS: dict[str, dict[str, str]] = {
    "MegatronStrategy": {
        "tp": "tensor_model_parallel_size tensor_model_parallel tensor_parallel tensor_parallel_size tensor_parallelism"
        " tp_size tp_degree tp_ranks tensor_parallel_degree num_tensor_parallel model_parallel_size mp_size",
        "pp": "pipeline_model_parallel_size pipeline_model_parallel pipeline_parallel pipeline_parallel_size"
        " pipeline_parallelism pp_size pp_degree pipeline_stages num_stages num_pipeline_stages"
        " pipeline_parallel_degree pipeline_size",
        "vp": "virtual_pipeline_model_parallel_size virtual_pipeline_parallel virtual_pipeline_size virtual_stages"
        " num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank vpp vpp_size vp_size interleave"
        " num_model_chunks virtual_pp virtual_pipeline_parallel_size model_chunks",
        "cp": "context_parallel_size context_parallel cp_size cp_degree context_parallelism sequence_parallel_size"
        " sp_size ulysses_sequence_parallel_size ulysses_degree ring_degree ring_attn_size",
        "cp_comm": "cp_comm_type cp_comm_backend cp_comm_strategy cp_communication context_parallel_comm_type"
        " context_parallel_communication cp_rotate_method ring_attention ulysses",
        "ep": "expert_model_parallel_size expert_parallel expert_parallel_size ep_size ep_degree expert_parallelism",
        "etp": "expert_tensor_parallel_size expert_tensor_parallel etp_size",
        "sequence_parallel": "sequence_parallelism sequence_model_parallel seq_parallel sp use_sp"
        " use_sequence_parallel sequence_parallel_enabled",
        "micro_batch_size": "microbatch_size mbs train_micro_batch_size_per_gpu micro_bs microbatch micro_batch",
        "num_microbatches": "num_micro_batches n_microbatches microbatches num_micro_batch micro_batches chunks",
        "distributed_optimizer": "use_distributed_optimizer use_dist_optimizer dist_optimizer zero_stage zero"
        " zero_optimization shard_optimizer optimizer_sharding",
        "recompute": "recompute_activations recompute_granularity recompute_method recompute_num_layers"
        " recompute_modules activation_checkpointing activations_checkpoint_granularity activations_checkpoint_method"
        " activation_checkpointing_policy activation_recompute gradient_checkpointing use_gradient_checkpointing"
        " checkpoint_activations gradient_checkpointing_kwargs remat",
        "kernels": "use_flash_attention use_flash_attn",
        "pipeline_split_rank": "pipeline_model_parallel_split_rank split_rank encoder_pipeline_model_parallel_size",
        "layers_per_stage": "pipeline_model_parallel_layout pipeline_layout pp_layout layers_per_pipeline_stage"
        " decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers num_layers_in_first_pipeline_stage"
        " num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split"
        " partition_method pipeline_partition stage_layers split_points",
        "ddp": "ddp_config distributed_data_parallel_config ddp_kwargs overlap_grad_reduce overlap_param_gather"
        " ddp_bucket_size gradient_reduce_div",
        "on_nonfinite": "check_for_nan_in_loss_and_grad no_check_for_nan_in_loss_and_grad"
        " check_for_nan_in_grad check_for_nan detect_nan skip_nan"
        " detect_anomaly nan_policy",
        "checkpointing": "ckpt_async_save ckpt_parallel_load ckpt_load_strictness ckpt_parallel_save"
        " ckpt_torch_dist_multiproc checkpoint_config ckpt_config checkpoint_io save_ckpt_format load_optim",
        "process_group_backend": "distributed_backend backend dist_backend ddp_backend pg_backend comm_backend",
        "timeout": "distributed_timeout_minutes dist_timeout ddp_timeout process_group_timeout nccl_timeout",
        "launch": "launcher start_method multiprocessing_context",
    },
    "GPTConfig BertConfig T5Config": {
        "num_layers": "n_layers n_layer num_hidden_layers layers_number depth nlayers num_blocks n_blocks"
        " encoder_num_layers transformer_layers layer_num num_decoder_layers",
        "hidden_size": "n_embd n_embed d_model dim hidden_dim embed_dim embedding_dim n_hidden hidden model_dim"
        " embedding_size hidden_width width emb_dim dim_model",
        "num_attention_heads": "n_head n_heads num_heads nhead nheads heads encoder_attention_heads attention_heads"
        " num_head",
        "vocab_size": "n_vocab num_tokens vocabulary_size num_embeddings padded_vocab_size vocab src_vocab_size",
        "seq_length": "max_position_embeddings n_positions n_ctx block_size context_length max_seq_len max_seq_length"
        " seq_len sequence_length max_length model_max_length max_sequence_length encoder_seq_length context_size"
        " ctx_len max_context_length n_context",
        "ffn_hidden_size": "intermediate_size d_ff n_inner ffn_dim ffn_size mlp_dim feedforward_dim dim_feedforward"
        " ffn_hidden_dim encoder_ffn_dim mlp_hidden_size intermediate_dim ffn",
        "kv_channels": "head_dim d_kv head_size attention_head_size dim_head d_head",
        "num_query_groups": "num_key_value_heads n_kv_heads num_kv_heads kv_heads n_kv_head group_query_attention"
        " num_kv_groups query_groups multi_query n_head_kv",
        "layernorm_epsilon": "layer_norm_eps rms_norm_eps layer_norm_epsilon norm_epsilon norm_eps layernorm_eps"
        " eps layer_norm_epsilon epsilon",
        "activation": "hidden_act activation_function activation_func act_fn hidden_activation act swiglu squared_relu"
        " openai_gelu gated_linear_unit nonlinearity afn feed_forward_proj",
        "hidden_dropout": "hidden_dropout_prob resid_pdrop embd_pdrop dropout resid_dropout dropout_rate dropout_prob"
        " dropout_p residual_dropout",
        "attention_dropout": "attention_probs_dropout_prob attn_pdrop attention_dropout_prob attn_dropout"
        " attention_dropout_rate",
        "init_method_std": "initializer_range init_std initializer_factor init_range std",
        "experts": "moe moe_config num_moe_layers mixture_of_experts use_moe",
        "layers": "transformer_impl layer_backend layer_impl use_transformer_engine use_te transformer_engine",
        "make_vocab_size_divisible_by": "pad_vocab_size_to_multiple_of vocab_padding vocab_divisor",
        "position_embedding": "position_embedding_type pos_emb positional_embedding position_embeddings pos_embd_type"
        " use_rotary_position_embeddings use_rope rope positional_encoding",
        "rotary_base": "rope_theta rotary_emb_base rope_base theta rope_freq_base global_rope_theta",
        "rotary_percent": "rotary_pct partial_rotary_factor rotary_fraction rotary_dim",
        "rope_scaling": "use_rope_scaling rope_scaling_factor rope_parameters rotary_seq_len_interpolation_factor"
        " rotary_scaling rope_scale",
        "sliding_window": "window_size attention_window window",
        "sliding_window_layers": "window_attn_skip_freq max_window_layers layer_types sliding_window_pattern"
        " global_attn_every_n_layers",
        "parallel_residual": "use_parallel_residual parallel_attn parallel_attention",
        "normalization": "norm_type norm layernorm_type normalization_type use_rmsnorm rmsnorm rms_norm",
        "bias": "add_bias_linear use_bias mlp_bias attention_bias disable_bias_linear linear_bias",
        "qkv_bias": "add_qkv_bias attn_bias",
        "tie_embeddings": "tie_word_embeddings share_embeddings_and_output_weights weight_tying tie_weights"
        " untie_embeddings_and_output_weights tied_embeddings",
        "embedding_multiplier": "embedding_scale scale_embeddings embed_scale normalize_embedding",
        "window_rotary_base": "rope_local_base_freq local_rope_theta rotary_base_local",
        "rotary_layers": "no_rope_layers no_rope_freq no_rope_layer_interval nope_layers",
        "logits_divisor": "logits_scaling logit_scale logits_scale",
        "attention_score_cap": "attn_logit_softcapping attention_softcap softcap attn_softcap",
        "logits_cap": "final_logit_softcapping logits_soft_cap final_softcap logit_cap",
        "latent_attention": "multi_latent_attention use_mla mla mla_config",
        "mtp": "mtp_num_layers num_nextn_predict_layers multi_token_prediction mtp_layers num_mtp_layers",
        "mtp_weight": "mtp_loss_scaling_factor mtp_loss_weight mtp_loss_coef",
        "extra": "config_kwargs model_kwargs other_megatron_args transformer_config",
    },
    "LatentAttention": {
        "q_lora_rank": "",
        "kv_lora_rank": "kv_rank latent_size kv_latent_dim",
        "qk_nope_head_dim": "qk_head_dim",
        "qk_rope_head_dim": "qk_pos_emb_head_dim rope_head_dim",
        "v_head_dim": "value_head_dim",
        "rope_interleave": "rotary_interleaved",
    },
    "Experts": {
        "num": "num_experts num_moe_experts num_local_experts n_experts n_routed_experts moe_num_experts num_expert",
        "top_k": "moe_router_topk num_experts_per_tok num_experts_per_token experts_per_token moe_top_k topk",
        "ffn_hidden_size": "moe_ffn_hidden_size moe_intermediate_size expert_hidden_size expert_ffn_hidden_size",
        "shared_ffn_hidden_size": "moe_shared_expert_intermediate_size shared_expert_intermediate_size n_shared_experts"
        " num_shared_experts shared_experts",
        "shared_gate": "moe_shared_expert_gate use_shared_expert_gate shared_expert_gate",
        "router": "moe_router_score_function scoring_func score_function score_func",
        "normalize_top_k": "norm_topk_prob moe_router_pre_softmax normalize_expert_weights route_norm norm_topk",
        "balancing": "moe_router_load_balancing_type load_balancing load_balancing_type moe_router_enable_expert_bias"
        " topk_method",
        "aux_weight": "moe_aux_loss_coeff router_aux_loss_coef aux_loss_coeff aux_loss_coef aux_loss_alpha"
        " moe_loss_weight",
        "z_weight": "moe_z_loss_coeff router_z_loss_coef z_loss_coeff moe_zloss_weight",
        "bias_rate": "moe_router_bias_update_rate bias_update_speed bias_update_rate",
        "capacity_factor": "moe_expert_capacity_factor moe_capacity_factor expert_capacity_factor expert_capacity",
        "layers": "moe_layer_freq first_k_dense_replace decoder_sparse_step mlp_only_layers moe_layers"
        " moe_layer_pattern expert_interval",
    },
    "GPTConfig BertConfig": {
        "num_labels": "num_classes n_classes n_labels num_class",
    },
    "BertConfig": {
        "task": "problem head bert_task add_binary_head bert_binary_head bert_no_binary_head",
        "num_token_types": "type_vocab_size num_tokentypes token_types",
        "norm_placement": "pre_ln post_ln norm_first prenorm",
        "classifier_pooling": "pooling pooling_mode pooling_strategy",
        "norm_bias": "layernorm_bias layer_norm_bias",
    },
    "T5Config": {
        "decoder_seq_length": "max_target_length target_length decoder_max_length",
        "decoder_num_layers": "num_decoder_layers decoder_layers",
        "encoder_num_layers": "num_encoder_layers encoder_layers",
        "relative_attention_num_buckets": "num_buckets relative_num_buckets",
        "relative_attention_max_distance": "max_distance relative_max_distance",
        "decoder_start_id": "decoder_start_token_id",
    },
    "GPTModule BertModule T5Module": {
        "config": "model_config transformer_config cfg model hparams",
        "optimizer": "optim optimizer_config optimizer_class optimizers optim_config optimizer_cls",
        "lr_schedule": "lr_scheduler scheduler schedule lr_scheduler_config lr_scheduler_type sched",
        "loss_reduction": "reduction calculate_per_token_loss loss_agg",
        "eod_id": "eod_token_id eos_token_id eos_id eod_token eod",
        "reset_position_ids": "reset_positions",
        "reset_attention_mask": "reset_mask",
        "eod_mask_loss": "mask_eod",
        "lora": "peft peft_config lora_config adapter_config",
        "label_smoothing": "label_smoothing_factor smoothing",
        "z_loss": "z_loss_weight zloss",
    },
    "LoRA": {
        "rank": "r lora_r dim lora_dim lora_rank adapter_dim",
        "alpha": "lora_alpha scaling scale",
        "targets": "target_modules lora_target modules target_layers layers_to_transform",
        "dropout": "lora_dropout adapter_dropout",
        "rslora": "use_rslora rank_stabilized",
        "also_train": "modules_to_save trainable_modules additional_trainable_modules",
    },
    "Kernels": {
        "fused_layers": "fused fuse compile torch_compile use_compile bias_activation_fusion bias_dropout_fusion"
        " apply_rope_fusion bias_gelu_fusion bias_swiglu_fusion masked_softmax_fusion persist_layer_norm",
        "chunked_loss": "cross_entropy_loss_fusion cross_entropy_fusion_impl fused_cross_entropy fused_loss"
        " fused_linear_cross_entropy chunked_cross_entropy use_liger_kernel",
        "fused_weight_gradients": "gradient_accumulation_fusion grad_accum_fusion wgrad_fusion",
        "attention": "attn_implementation attention_backend use_flash_attn use_flash_attention flash_attention"
        " flash_attn attention_impl attn_backend attention_kernel sdpa_backend",
        "expert_dispatch": "moe_token_dispatcher_type token_dispatcher_type token_dispatcher",
    },
    "Checkpointing": {
        "async_save": "async_checkpoint ckpt_async_save save_async async_ use_async_ckpt",
        "on_save_error": "on_error raise_on_save_error",
        "verify_checksums": "verify_checkpoint verify_integrity checksum checksums verify",
        "allow_pickle": "trust_checkpoint weights_only",
        "optimizer_settings": "override_opt_param_scheduler use_checkpoint_opt_param_scheduler",
        "skip_batches": "skip_train_batches iterations_to_skip",
    },
    "LRSchedule": {
        "style": "lr_decay_style lr_scheduler_type decay_style schedule kind lr_schedule name decay scheduler_type",
        "warmup_steps": "lr_warmup_iters warmup_iters num_warmup_steps lr_warmup_steps warmup warmup_num_steps"
        " lr_warmup_samples warmup_samples",
        "warmup_fraction": "warmup_ratio lr_warmup_fraction warmup_pct",
        "decay_steps": "lr_decay_iters lr_decay_steps num_training_steps lr_decay_samples decay_iters t_max"
        " total_steps max_steps total_num_steps",
        "min_lr": "eta_min lr_min end_lr final_lr min_learning_rate lr_end",
        "init_lr": "lr_warmup_init warmup_init_lr start_lr initial_lr",
        "weight_decay_style": "weight_decay_incr_style wd_incr_style",
        "start_weight_decay": "start_wd",
        "end_weight_decay": "end_wd",
        "weight_decay_steps": "wd_incr_steps",
        "wsd_decay_steps": "lr_wsd_decay_iters lr_wsd_decay_samples",
        "wsd_decay_style": "lr_wsd_decay_style",
    },
    "ParameterGroups": {
        "no_weight_decay": "no_wd_decay_cond no_decay no_weight_decay_cond no_decay_cond no_wd",
        "scale_lr": "scale_lr_cond lr_scale",
        "lr_mult": "lr_multiplier",
    },
    "LeanAdamW Muon": {
        "lr": "learning_rate max_lr base_lr",
        "betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
        "eps": "adam_eps adam_epsilon epsilon",
        "weight_decay": "wd",
        "exp_avg_dtype": "moment_dtype state_dtype momentum_dtype",
        "on_host": "cpu_offload optimizer_cpu_offload offload offload_optimizer",
        "ns_steps": "newton_schulz_steps muon_num_ns_steps num_ns_steps",
        "momentum": "sgd_momentum muon_momentum",
    },
    "MegatronPrecision": {
        "initial_loss_scale": "init_scale initial_scale_power loss_scale fp16_initial_loss_scale initial_scale",
        "recipe": "fp8_recipe fp8",
    },
    "TextDataModule HFDataModule ChatDataModule MegatronDataModule": {
        "paths": "data_path path data files train_file data_dir data_paths train_data_path dataset_path filenames",
        "seq_length": "max_seq_length seq_len block_size max_length sequence_length context_length cutoff_len",
        "batch_size": "micro_batch_size per_device_train_batch_size train_batch_size bs batch mbs",
        "global_batch_size": "gbs total_batch_size effective_batch_size",
        "tokenizer": "tokenizer_model tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_type",
        "split": "splits train_split val_split splits_string validation_split dataset_split",
        "suffixes": "extensions extension file_types",
        "cache_dir": "data_cache_path cache_path index_mapping_dir cache cache_folder",
        "num_workers": "dataloader_num_workers workers n_workers num_dataloader_workers",
        "seed": "data_seed random_seed",
        "shuffle": "shuffle_data",
        "drop_last": "dataloader_drop_last",
        "collate_fn": "data_collator collator collate",
        "samples": "dataset_kwargs",
        "weights": "blend_weights data_weights probabilities",
        "ramp_up": "rampup_batch_size batch_size_rampup rampup",
        "train_samples": "num_train_samples max_train_samples",
        "dataset": "dataset_name data_name name dataset_name_or_path dataset_path path",
        "config_name": "dataset_config_name dataset_config subset",
        "text_column": "text_field dataset_text_field text_key json_keys text_column_name input_column",
        "prompt_column": "prompt_field prompt_key instruction_column",
        "messages_column": "messages_field conversations_column chat_column messages_key",
        "loss_on": "assistant_only_loss train_on_responses_only completion_only_loss",
        "append_eod": "add_eos append_eos add_eos_token append_eos_token",
        "packing": "pack sample_packing packed pack_sequences packed_sequence",
        "num_proc": "preprocessing_num_workers dataset_num_proc",
        "load_options": "dataset_kwargs load_dataset_kwargs",
    },
    "MaskedLMCollator SpanCorruptionCollator SentencePairCollator BertSamples T5Samples": {
        "probability": "mlm_probability mask_prob masked_lm_prob mask_probability masking_prob masking_probability",
        "mask_id": "mask_token_id",
        "pad_id": "pad_token_id padding_value",
        "masking_probability": "mask_prob masked_lm_prob mlm_probability",
        "short_sequence_probability": "short_seq_prob",
        "binary_head": "classification_head nsp next_sentence_prediction",
        "noise_density": "mask_prob noise",
        "mean_span_length": "mean_noise_span_length",
        "whole_words": "whole_word_mask masking_do_full_word",
        "eos_id": "eos_token_id",
        "cls_id": "cls_token_id",
        "sep_id": "sep_token_id",
    },
    "Throughput TrainingProgressBar Profile PipelineTimeline ExitInterval Perplexity TrainingMonitor": {
        "peak_tflops": "peak_flops device_tflops theoretical_flops",
        "window": "window_size",
        "refresh_rate": "refresh log_interval",
        "directory": "dirpath dir output_dir save_dir path out folder",
        "first": "start profile_step_start start_step",
        "last": "end profile_step_end end_step stop",
        "steps": "step exit_interval interval every_n_steps at_step",
        "loss": "metric monitor",
        "zeros": "log_num_zeros_in_grad num_zeros",
    },
    "ParallelLayout": {
        "world_size": "num_gpus n_gpus gpus devices ranks num_ranks n_ranks num_processes nproc world ngpus",
    },
}

# A switch elsewhere that is a value here; of several arguments, what each of them takes.
VALUES: dict[str, str] = {
    "recompute_activations": "recompute='selective'",
    "gradient_checkpointing": "recompute='full'",
    "use_gradient_checkpointing": "recompute='full'",
    "activation_checkpointing": "recompute='full'",
    "checkpoint_activations": "recompute='full'",
    "zero_stage": "distributed_optimizer=True",
    "zero": "distributed_optimizer=True",
    "check_for_nan_in_loss_and_grad": "on_nonfinite='raise'",
    "no_check_for_nan_in_loss_and_grad": "on_nonfinite='ignore'",
    "check_for_nan_in_grad": "on_nonfinite='raise'",
    "detect_anomaly": "on_nonfinite='raise'",
    "skip_nan": "on_nonfinite='skip'",
    "use_flash_attention": "attention='flash' kernels=Kernels(attention='flash')",
    "use_flash_attn": "attention='flash' kernels=Kernels(attention='flash')",
    "flash_attention": "attention='flash'",
    "flash_attn": "attention='flash'",
    "compile": "fused_layers=True",
    "torch_compile": "fused_layers=True",
    "swiglu": "activation='swiglu'",
    "squared_relu": "activation='squared_relu'",
    "openai_gelu": "activation='gelu_tanh'",
    "use_rope": "position_embedding='rope'",
    "rope": "position_embedding='rope'",
    "use_rotary_position_embeddings": "position_embedding='rope'",
    "use_rmsnorm": "normalization='RMSNorm'",
    "rmsnorm": "normalization='RMSNorm'",
    "rms_norm": "normalization='RMSNorm'",
    "disable_bias_linear": "bias=False",
    "untie_embeddings_and_output_weights": "tie_embeddings=False",
    "use_transformer_engine": "layers='transformer_engine'",
    "use_te": "layers='transformer_engine'",
    "transformer_engine": "layers='transformer_engine'",
    "multi_query": "num_query_groups=1",
    "assistant_only_loss": "loss_on='assistant'",
    "train_on_responses_only": "loss_on='assistant'",
    "bert_no_binary_head": "task='masked_lm'",
    "norm_first": "norm_placement='before'",
    "pre_ln": "norm_placement='before'",
    "post_ln": "norm_placement='after'",
    "use_rslora": "rslora=True",
    "rank_stabilized": "rslora=True",
    "cpu_offload": "on_host=True",
    "optimizer_cpu_offload": "on_host=True",
    "offload_optimizer": "on_host=True",
    "bf16": "precision='bf16-mixed'",
    "fp16": "precision='16-mixed'",
    "fp8": "precision='transformer-engine'",
    "amp": "precision='bf16-mixed'",
    "half_precision": "precision='16-mixed'",
    "deterministic_mode": "deterministic=True",
}

# Arguments of Lightning's Trainer, and what others call them.
TRAINER: dict[str, str] = {
    "devices": "gpus num_gpus n_gpus num_processes nproc_per_node ngpus gpus_per_node",
    "num_nodes": "nnodes num_machines",
    "precision": "mixed_precision bf16 fp16 fp8 dtype params_dtype pipeline_dtype torch_dtype autocast_dtype amp"
    " half_precision",
    "max_steps": "train_iters max_iters train_steps num_train_steps total_steps max_train_steps iters",
    "max_epochs": "num_train_epochs epochs num_epochs n_epochs",
    "gradient_clip_val": "clip_grad max_grad_norm gradient_clipping grad_clip clip_grad_norm max_norm",
    "accumulate_grad_batches": "gradient_accumulation_steps grad_accum grad_accumulation_steps gradient_accumulation",
    "val_check_interval": "eval_interval eval_steps",
    "limit_val_batches": "eval_iters",
    "log_every_n_steps": "log_interval logging_steps",
    "accelerator": "device",
    "deterministic": "deterministic_mode",
    "default_root_dir": "output_dir save_dir",
    "logger": "report_to wandb_project tensorboard_dir",
    "callbacks": "",
    "enable_progress_bar": "disable_tqdm",
}

# What is no argument of a class here, by the class ("" for all), and what there is instead.
ELSEWHERE: dict[str, dict[str, str]] = {
    "LoRA": {
        "bias use_bias lora_bias": "biases stay frozen, as with peft's bias='none'",
        "task_type inference_mode base_model_name_or_path fan_in_fan_out init_lora_weights": (
            "save_adapter writes it into peft's file by itself"
        ),
        "use_dora use_qalora loftq_config": "only plain LoRA is here, and rslora=True",
    },
    "": {
        "data_parallel_size data_parallel dp dp_size dp_degree dp_replicate_degree num_replicas": (
            "it is what is left of the ranks, Trainer(devices=, num_nodes=) / (tp · pp)"
        ),
        "global_batch_size gbs total_batch_size": (
            "it is the loader's batch_size times the data-parallel size; MegatronDataModule takes it as"
            " global_batch_size"
        ),
        "num_experts num_moe_experts num_local_experts moe_router_topk num_experts_per_tok moe_grouped_gemm": (
            "it is GPTConfig(experts=Experts(num=8, top_k=2)), and MegatronStrategy(ep=) divides the experts"
        ),
        "lr learning_rate max_lr weight_decay wd": (
            "it is the optimizer's, such as GPTModule(optimizer=lambda p: torch.optim.AdamW(p, lr=3e-4,"
            " weight_decay=0.1))"
        ),
        "device_map max_memory low_cpu_mem_usage": "MegatronStrategy(tp=, pp=) says which rank holds which weights",
        "load_in_8bit load_in_4bit quantization_config bnb_4bit_compute_dtype": (
            "quantised weights are not here; lora=LoRA(), MegatronStrategy(tp=2) and MegatronStrategy(recompute='full')"
            " take less memory"
        ),
        "strategy": "it is Trainer(strategy=MegatronStrategy(tp=2))",
        "trust_remote_code": "models are built from megatron-core's layers, and no code of the hub runs",
        "token use_auth_token": "`hf auth login` opens models that are not public",
        "fsdp fully_shard use_fsdp use_megatron_fsdp use_custom_fsdp fsdp_config": (
            "FSDP is Lightning's, Trainer(strategy='fsdp'); here MegatronStrategy(tp=, pp=) divides the weights"
        ),
    },
}
