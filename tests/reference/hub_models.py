"""Popular models of the Hugging Face hub: config.json as published, but for tiny sizes, and the tensors' names.

A model's directory is made from its configuration: weights are drawn, and stored under the names, in the files and
beside the buffers that the published ones have.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

VOCAB = 61
Tensors = dict[str, torch.Tensor]

_GPT2: dict[str, Any] = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50,
    "embd_pdrop": 0.1, "eos_token_id": 50, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 32, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 32, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": VOCAB,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
_NEOX: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 96, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 64, "model_type": "gpt_neox", "num_attention_heads": 2, "num_hidden_layers": 2,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": VOCAB,
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 64,
    "model_type": "llama", "num_attention_heads": 3, "num_hidden_layers": 2, "num_key_value_heads": 3,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": VOCAB,
}  # fmt: skip
_LLAMA3 = {
    **_LLAMA, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 40, "eos_token_id": [41, 48, 49],
    "mlp_bias": False, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        "rope_type": "llama3",
    },
}  # fmt: skip
_MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 64,
    "model_type": "mistral", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 8, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": VOCAB,
}  # fmt: skip
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 43, "eos_token_id": 45,
    "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 40,
    "max_position_embeddings": 64, "max_window_layers": 1, "model_type": "qwen2", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 8, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": VOCAB,
}  # fmt: skip
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 43,
    "eos_token_id": 45, "head_dim": 10, "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02,
    "intermediate_size": 40, "max_position_embeddings": 64, "max_window_layers": 2, "model_type": "qwen3",
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": VOCAB,
}  # fmt: skip
_GEMMA = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 10, "hidden_act": "gelu", "hidden_size": 24, "initializer_range": 0.02,
    "intermediate_size": 40, "max_position_embeddings": 64, "model_type": "gemma", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.38.0.dev0", "use_cache": True,
    "vocab_size": VOCAB,
}  # fmt: skip
_GEMMA2 = {
    **_GEMMA, "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 5.0, "cache_implementation": "hybrid",
    "final_logit_softcapping": 3.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2", "num_hidden_layers": 3, "query_pre_attn_scalar": 12, "sliding_window": 6,
    "sliding_window_size": 6, "torch_dtype": "float32", "transformers_version": "4.42.0.dev0",
}  # fmt: skip
_GEMMA3 = {
    **{name: value for name, value in _GEMMA.items() if name not in ("hidden_act", "rope_scaling")},
    "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "eos_token_id": [1, 40], "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma3_text", "num_hidden_layers": 7, "query_pre_attn_scalar": 12, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 5, "sliding_window_pattern": 6,
    "transformers_version": "4.50.0.dev0",
}  # fmt: skip
_PHI3 = {
    "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModel": "modeling_phi3.Phi3Model"},
    "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 50, "hidden_act": "silu", "hidden_size": 24,
    "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 64, "model_type": "phi3",
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 4, "original_max_position_embeddings": 64,
    "pad_token_id": 50, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 15, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.2",
    "use_cache": True, "attention_bias": False, "vocab_size": VOCAB,
}  # fmt: skip
_NEW: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 64,
    "num_attention_heads": 6, "num_hidden_layers": 5, "num_key_value_heads": 2, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": VOCAB,
}  # fmt: skip
_OLMO2 = {**_NEW, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "transformers_version": "4.47.0"}
_GRANITE = {
    **_NEW, "architectures": ["GraniteForCausalLM"], "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0,
    "logits_scaling": 8.0, "mlp_bias": False, "model_type": "granite", "residual_multiplier": 0.22,
    "rope_scaling": None, "tie_word_embeddings": True,
}  # fmt: skip
_SMOLLM3 = {
    **_NEW, "architectures": ["SmolLM3ForCausalLM"], "layer_types": ["full_attention"] * 5, "max_window_layers": 28,
    "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1],
    "pretraining_tp": 2, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "use_sliding_window": False,
}  # fmt: skip
_GLM4 = {
    **_NEW, "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "head_dim": 8, "model_type": "glm4",
    "eos_token_id": [40, 41], "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
}  # fmt: skip
_STARCODER2: dict[str, Any] = {
    "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1, "attention_softmax_in_fp32": True,
    "bos_token_id": 0, "embedding_dropout": 0.1, "eos_token_id": 0, "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 24, "initializer_range": 0.018042, "intermediate_size": 96, "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 64, "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05,
    "norm_type": "layer_norm", "num_attention_heads": 6, "num_hidden_layers": 5, "num_key_value_heads": 2,
    "residual_dropout": 0.1, "rope_theta": 999999.4420358813, "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True, "sliding_window": 8, "torch_dtype": "float32", "use_bias": True, "use_cache": True,
    "vocab_size": VOCAB,
}  # fmt: skip
_PHI: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 50, "embd_pdrop": 0.0,
    "eos_token_id": 50, "hidden_act": "gelu_new", "hidden_size": 24, "initializer_range": 0.02,
    "intermediate_size": 96, "layer_norm_eps": 1e-05, "max_position_embeddings": 64, "model_type": "phi",
    "num_attention_heads": 3, "num_hidden_layers": 5, "num_key_value_heads": None, "partial_rotary_factor": 0.5,
    "qk_layernorm": False, "resid_pdrop": 0.0, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True, "vocab_size": VOCAB,
}  # fmt: skip
_WITH_EXPERTS = {
    **_NEW, "num_experts_per_tok": 3, "output_router_logits": False, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
}  # fmt: skip
_MIXTRAL = {
    **{name: value for name, value in _WITH_EXPERTS.items() if name not in ("attention_bias", "pad_token_id")},
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 6, "rms_norm_eps": 1e-05,
    "sliding_window": None, "transformers_version": "4.36.0.dev0",
}  # fmt: skip
_QWEN3_MOE = {
    **_WITH_EXPERTS, "architectures": ["Qwen3MoeForCausalLM"], "bos_token_id": 43, "decoder_sparse_step": 1,
    "eos_token_id": 45, "head_dim": 10, "max_window_layers": 5, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 16, "norm_topk_prob": True, "num_experts": 6, "rope_scaling": None,
    "sliding_window": None, "transformers_version": "4.51.0", "use_sliding_window": False,
}  # fmt: skip
_QWEN2_MOE = {
    **{name: value for name, value in _WITH_EXPERTS.items() if name not in ("attention_bias", "pad_token_id")},
    "architectures": ["Qwen2MoeForCausalLM"], "bos_token_id": 43, "decoder_sparse_step": 1, "eos_token_id": 45,
    "max_window_layers": 5, "model_type": "qwen2_moe", "moe_intermediate_size": 16, "norm_topk_prob": False,
    "num_experts": 6, "shared_expert_intermediate_size": 28, "sliding_window": 8, "transformers_version": "4.39.0.dev0",
    "use_sliding_window": False,
}  # fmt: skip
_GPT_OSS = {
    **{name: value for name, value in _WITH_EXPERTS.items() if name != "pad_token_id"},
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "eos_token_id": 50, "experts_per_token": 3,
    "head_dim": 10, "initial_context_length": 16, "layer_types": ["sliding_attention", "full_attention"] * 2
    + ["sliding_attention"], "model_type": "gpt_oss", "num_local_experts": 6, "pad_token_id": 49, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 16,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 8, "swiglu_limit": 7.0,
    "transformers_version": "4.55.0.dev0",
}  # fmt: skip
_OLMOE = {
    **_WITH_EXPERTS, "architectures": ["OlmoeForCausalLM"], "clip_qkv": None, "eos_token_id": 50, "model_type": "olmoe",
    "norm_topk_prob": False, "num_experts": 6, "num_key_value_heads": 6, "pad_token_id": 1, "rope_scaling": None,
    "transformers_version": "4.43.0.dev0",
}  # fmt: skip
_GRANITE_MOE = {
    **_WITH_EXPERTS, "architectures": ["GraniteMoeForCausalLM"], "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0, "logits_scaling": 6.0, "model_type": "granitemoe", "num_local_experts": 6,
    "residual_multiplier": 0.22, "rope_scaling": None, "tie_word_embeddings": True, "transformers_version": "4.47.0",
}  # fmt: skip
_DEEPSEEK = {
    **{name: value for name, value in _NEW.items() if name not in ("pad_token_id", "rope_theta")},
    "first_k_dense_replace": 1, "kv_lora_rank": 12, "moe_intermediate_size": 16, "n_group": 1, "n_routed_experts": 6,
    "n_shared_experts": 2, "num_experts_per_tok": 3, "num_key_value_heads": 6, "pretraining_tp": 1, "q_lora_rank": None,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "rope_theta": 10000, "routed_scaling_factor": 1.0, "topk_group": 1,
    "v_head_dim": 8,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 2, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 32, "type": "yarn",
    },
}  # fmt: skip
_DEEPSEEK_V2 = {
    **_DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "aux_loss_alpha": 0.001, "ep_size": 1,
    "model_type": "deepseek_v2", "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
    "seq_aux": True, "topk_method": "greedy", "transformers_version": "4.33.1",
}  # fmt: skip
_DEEPSEEK_V3 = {
    **_DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "ep_size": 1, "model_type": "deepseek_v3",
    "moe_layer_freq": 1, "n_group": 3, "norm_topk_prob": True, "num_nextn_predict_layers": 1, "q_lora_rank": 16,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 2, "topk_method": "noaux_tc",
    "transformers_version": "4.33.1",
}  # fmt: skip
_BERT: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 24, "initializer_range": 0.02,
    "intermediate_size": 40, "layer_norm_eps": 1e-12, "max_position_embeddings": 32, "model_type": "bert",
    "num_attention_heads": 3, "num_hidden_layers": 2, "pad_token_id": 0, "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": VOCAB,
}  # fmt: skip
_POOLER = {
    "directionality": "bidi", "pooler_fc_size": 24, "pooler_num_attention_heads": 3, "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 8, "pooler_type": "first_token_transform",
}  # fmt: skip
_ROBERTA = {
    **_BERT, "architectures": ["RobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 34, "model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1,
}  # fmt: skip
_MODERN_BERT: dict[str, Any] = {
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 50,
    "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean",
    "cls_token_id": 50, "decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0,
    "eos_token_id": 51, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "gradient_checkpointing": False,
    "hidden_activation": "gelu", "hidden_size": 24, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02,
    "intermediate_size": 40, "layer_norm_eps": 1e-05, "local_attention": 6, "local_rope_theta": 10000.0,
    "max_position_embeddings": 64, "mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert",
    "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 3, "num_hidden_layers": 5, "pad_token_id": 52,
    "position_embedding_type": "absolute", "sep_token_id": 51, "tie_word_embeddings": True, "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0", "vocab_size": VOCAB,
}  # fmt: skip
_T5: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 40, "d_kv": 8, "d_model": 24,
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 64, "num_heads": 3,
    "num_layers": 2, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"early_stopping": True, "length_penalty": 2.0, "num_beams": 4}},
    "vocab_size": VOCAB,
}  # fmt: skip
_T5_GATED = {
    **{name: value for name, value in _T5.items() if name not in ("n_positions", "task_specific_params")},
    "feed_forward_proj": "gated-gelu", "num_decoder_layers": 2, "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer", "transformers_version": "4.23.1", "use_cache": True,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": _GPT2,
    "distilbert/distilgpt2": {
        **_GPT2, "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_layer": 1,
    },
    "microsoft/DialoGPT-medium": {**_GPT2, "task_specific_params": {"conversational": {"max_length": 1000}}},
    "cerebras/Cerebras-GPT-111M": {
        **_GPT2, "activation_function": "gelu", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "n_inner": 96, "scale_attn_weights": True, "use_cache": True,
    },
    "EleutherAI/pythia-160m": _NEOX,
    "EleutherAI/gpt-neox-20b": {
        **_NEOX, "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0, "hidden_act": "gelu_fast",
        "torch_dtype": "float16",
    },
    "databricks/dolly-v2-3b": {
        **_NEOX, "custom_pipelines": {"text-generation": {"impl": "instruct_pipeline.Pipeline"}},
        "torch_dtype": "bfloat16",
    },
    "meta-llama/Llama-2-7b-hf": {**_LLAMA, "_name_or_path": "meta-llama/Llama-2-7b-hf", "pad_token_id": 0},
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {**_LLAMA, "attention_bias": False, "pretraining_tp": 1, "rope_theta": 1e4},
    "lmsys/vicuna-7b-v1.5": {**_LLAMA, "max_sequence_length": 64, "pad_token_id": 0, "rope_scaling": None},
    "lmsys/vicuna-7b-v1.5-16k": {**_LLAMA, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "NousResearch/Yarn-Llama-2-7b-64k": {
        **_LLAMA,
        "auto_map": {"AutoConfig": "configuration_llama.LlamaConfig"},
        "rope_scaling": {
            "factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn", "finetuned": True,
        },
    },
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3,
    "meta-llama/Llama-3.2-1B": {**_LLAMA3, "head_dim": 8, "tie_word_embeddings": True},
    "unsloth/llama-3-8b": {**_LLAMA3, "rope_scaling": None, "pad_token_id": 50, "unsloth_version": "2024.9"},
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {**_LLAMA3, "pretraining_tp": 1},
    "HuggingFaceTB/SmolLM2-135M": {
        **_LLAMA, "is_llama_config": True, "rope_interleaved": False, "tie_word_embeddings": True,
        "rope_theta": 100000, "transformers.js_config": {"dtype": "q4"},
    },
    "01-ai/Yi-6B": {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 1, "rope_theta": 5e6, "pad_token_id": 0},
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.3": {**_MISTRAL, "sliding_window": None, "rope_theta": 1e6},
    "mistralai/Mistral-Nemo-Base-2407": {**_MISTRAL, "head_dim": 10, "sliding_window": None, "rope_theta": 1e6},
    "HuggingFaceH4/zephyr-7b-beta": {**_MISTRAL, "pad_token_id": 2, "_attn_implementation_autoset": True},
    "Qwen/Qwen2.5-0.5B": _QWEN2,
    "Qwen/Qwen2.5-7B-Instruct-1M": {**_QWEN2, "tie_word_embeddings": False, "use_sliding_window": True},
    "Qwen/QwQ-32B": {**_QWEN2, "tie_word_embeddings": False, "pad_token_id": 45, "max_window_layers": 2},
    "Qwen/Qwen3-0.6B": _QWEN3,
    "google/gemma-2b": _GEMMA,
    "google/gemma-1.1-2b-it": {**_GEMMA, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    "google/codegemma-2b": {**_GEMMA, "hidden_activation": None, "hidden_act": "gelu_pytorch_tanh"},
    "google/gemma-2-2b": _GEMMA2,
    "google/gemma-2-27b-it": {**_GEMMA2, "query_pre_attn_scalar": 9},
    "google/gemma-3-1b-pt": _GEMMA3,
    "google/gemma-3-270m-it": {
        **_GEMMA3, "_sliding_window_pattern": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 2,
        "use_bidirectional_attention": False,
    },
    "microsoft/Phi-3-mini-4k-instruct": _PHI3,
    "microsoft/phi-4": {**_PHI3, "sliding_window": None, "rope_theta": 250000, "num_key_value_heads": 2},
    "allenai/OLMo-2-1124-7B": _OLMO2,
    "ibm-granite/granite-3.3-2b-instruct": _GRANITE,
    "HuggingFaceTB/SmolLM3-3B": _SMOLLM3,
    "zai-org/GLM-4-9B-0414": _GLM4,
    "zai-org/GLM-4-32B-Base-0414": {**_GLM4, "attention_bias": True},
    "bigcode/starcoder2-3b": _STARCODER2,
    "microsoft/phi-2": {**_PHI, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "microsoft/phi-1": {**_PHI, "qk_layernorm": True},
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL,
    "Qwen/Qwen1.5-MoE-A2.7B": _QWEN2_MOE,
    "Qwen/Qwen3-30B-A3B": _QWEN3_MOE,
    "unsloth/gpt-oss-20b-BF16": _GPT_OSS,
    "allenai/OLMoE-1B-7B-0924": _OLMOE,
    "ibm-granite/granite-3.1-1b-a400m-base": _GRANITE_MOE,
    "deepseek-ai/DeepSeek-V2-Lite": _DEEPSEEK_V2,
    "deepseek-ai/DeepSeek-V3": _DEEPSEEK_V3,
    "google-bert/bert-base-uncased": _BERT,
    "google-bert/bert-base-multilingual-cased": {**_BERT, **_POOLER},
    "google-bert/bert-base-chinese": {**_BERT, **_POOLER, "transformers_version": "4.0"},
    "google-bert/bert-large-uncased": _BERT,
    "prajjwal1/bert-tiny": {"hidden_size": 24, "hidden_act": "gelu", "initializer_range": 0.02, "vocab_size": VOCAB,
        "hidden_dropout_prob": 0.1, "num_attention_heads": 3, "type_vocab_size": 2, "max_position_embeddings": 32,
        "num_hidden_layers": 2, "intermediate_size": 40, "attention_probs_dropout_prob": 0.1, "model_type": "bert",
    },
    "nlptown/bert-base-multilingual-uncased-sentiment": {
        **_BERT, **_POOLER, "architectures": ["BertForSequenceClassification"], "finetuning_task": "sentiment-analysis",
        "id2label": {str(n): f"{n + 1} stars" for n in range(5)}, "label2id": {f"{n + 1} stars": n for n in range(5)},
        "_num_labels": 5, "output_past": True,
    },
    "ProsusAI/finbert": {
        **_BERT, "architectures": ["BertForSequenceClassification"], "classifier_dropout": None,
        "id2label": {"0": "positive", "1": "negative", "2": "neutral"},
        "label2id": {"positive": 0, "negative": 1, "neutral": 2}, "problem_type": "single_label_classification",
    },
    "dslim/bert-base-NER": {
        **_BERT, "_num_labels": 3, "architectures": ["BertForTokenClassification"], "output_past": True,
        "id2label": {"0": "O", "1": "B-MISC", "2": "I-MISC"}, "label2id": {"B-MISC": 1, "I-MISC": 2, "O": 0},
    },
    "FacebookAI/roberta-base": _ROBERTA,
    "cardiffnlp/twitter-roberta-base-sentiment": {
        **_ROBERTA, "architectures": ["RobertaForSequenceClassification"], "hidden_act": "gelu_new",
        "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    },
    "Jean-Baptiste/roberta-large-ner-english": {
        **_ROBERTA, "architectures": ["RobertaForTokenClassification"], "classifier_dropout": None,
        "id2label": {"0": "O", "1": "PER"}, "label2id": {"O": 0, "PER": 1},
    },
    "deepset/roberta-base-squad2": {
        **_ROBERTA, "architectures": ["RobertaForQuestionAnswering"], "language": "english", "name": "Roberta",
    },
    "FacebookAI/xlm-roberta-base": {
        **_ROBERTA, "architectures": ["XLMRobertaForMaskedLM"], "model_type": "xlm-roberta", "output_past": True,
    },
    "almanach/camembert-base": {**_ROBERTA, "architectures": ["CamembertForMaskedLM"], "model_type": "camembert"},
    "answerdotai/ModernBERT-base": _MODERN_BERT,
    "google-t5/t5-small": _T5,
    "google-t5/t5-base": {**_T5, "num_decoder_layers": 2, "classifier_dropout": 0.0, "dense_act_fn": "relu"},
    "google/t5-v1_1-base": _T5_GATED,
    "google/flan-t5-base": {**_T5_GATED, "n_positions": 64, "relative_attention_max_distance": 128},
}  # fmt: skip


def _nothing(tensors: Tensors) -> Tensors:
    return tensors


def _gpt2(tensors: Tensors) -> Tensors:
    """Without the prefix and the output layer, and with masks."""
    found = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return found | {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(2)}


def _dialogpt(tensors: Tensors) -> Tensors:
    found = _gpt2(tensors)
    found |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    return {f"transformer.{name}": tensor for name, tensor in found.items()} | {"lm_head.weight": found["wte.weight"]}


def _neox(tensors: Tensors) -> Tensors:
    found = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        attention = f"gpt_neox.layers.{layer}.attention."
        found[f"{attention}bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        found[f"{attention}masked_bias"] = torch.tensor(-1e9)
        found[f"{attention}rotary_emb.inv_freq"] = torch.ones(2)
    return found


def _llama(tensors: Tensors) -> Tensors:
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    return tensors | buffers


def _bert(tensors: Tensors) -> Tensors:
    """TensorFlow's names of the norms; a pooler and a second head, which are not of this architecture."""
    found = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    found |= {"bert.pooler.dense.weight": torch.ones(24, 24), "bert.pooler.dense.bias": torch.ones(24)}
    found |= {"cls.seq_relationship.weight": torch.ones(2, 24), "cls.seq_relationship.bias": torch.ones(2)}
    return found


def _roberta(tensors: Tensors) -> Tensors:
    """A pooler, which is not of this architecture, and positions."""
    found = tensors | {"roberta.embeddings.position_ids": torch.arange(34)[None]}
    return found | {"roberta.pooler.dense.weight": torch.ones(24, 24), "roberta.pooler.dense.bias": torch.ones(24)}


def _positions(tensors: Tensors) -> Tensors:
    return tensors | {"bert.embeddings.position_ids": torch.arange(32)[None]}


def _untied_t5(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": torch.randn(VOCAB, 24, dtype=tensors["shared.weight"].dtype)}


def _t5(tensors: Tensors) -> Tensors:
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone() for stack in ("encoder", "decoder")}
    return tensors | copies | {name: torch.ones(32, 3)}


def _one_by_one(block: str, gate: str, up: str, down: str) -> Callable[[Tensors], Tensors]:
    """A matrix for each expert, in a ``block`` of each layer, where transformers' model has one tensor for all."""

    def stored(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            name = name.replace(".mlp.", f".{block}.")
            whole, _, kind = name.rpartition(".")
            if not whole.endswith("experts"):
                found[name] = tensor
                continue
            for expert, matrix in enumerate(tensor):
                if kind == "down_proj":
                    found[f"{whole}.{expert}.{down}.weight"] = matrix
                    continue
                half = len(matrix) // 2
                found[f"{whole}.{expert}.{gate}.weight"] = matrix[:half]
                found[f"{whole}.{expert}.{up}.weight"] = matrix[half:]
        return found

    return stored


def _granite_moe(tensors: Tensors) -> Tensors:
    names = {
        "experts.gate_up_proj": "input_linear.weight",
        "experts.down_proj": "output_linear.weight",
        "router.weight": "router.layer.weight",
    }
    for new, old in names.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    return tensors


_QWENS_EXPERTS = _one_by_one("mlp", "gate_proj", "up_proj", "down_proj")


def _deepseek_v3(tensors: Tensors) -> Tensors:
    """A layer behind the others predicts the token after the next."""
    found, last, further = _QWENS_EXPERTS(tensors), "model.layers.4.", "model.layers.5."
    found |= {name.replace(last, further): tensor.clone() for name, tensor in found.items() if name.startswith(last)}
    found |= {f"{further}{name}.weight": torch.ones(24) for name in ("enorm", "hnorm", "shared_head.norm")}
    found[f"{further}eh_proj.weight"] = torch.ones(24, 48)
    found[f"{further}embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
    found[f"{further}shared_head.head.weight"] = found["lm_head.weight"].clone()
    return found


STORED: dict[str, Callable[[Tensors], Tensors]] = {
    "openai-community/gpt2": _gpt2,
    "microsoft/DialoGPT-medium": _dialogpt,
    "EleutherAI/pythia-160m": _neox,
    "EleutherAI/gpt-neox-20b": _neox,
    "databricks/dolly-v2-3b": _neox,
    "meta-llama/Llama-2-7b-hf": _llama,
    "lmsys/vicuna-7b-v1.5": _llama,
    "mistralai/Mixtral-8x7B-v0.1": _one_by_one("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen/Qwen1.5-MoE-A2.7B": _QWENS_EXPERTS,
    "Qwen/Qwen3-30B-A3B": _QWENS_EXPERTS,
    "allenai/OLMoE-1B-7B-0924": _QWENS_EXPERTS,
    "ibm-granite/granite-3.1-1b-a400m-base": _granite_moe,
    "deepseek-ai/DeepSeek-V2-Lite": _QWENS_EXPERTS,
    "deepseek-ai/DeepSeek-V3": _deepseek_v3,
    "google-bert/bert-base-uncased": _bert,
    "google-bert/bert-base-chinese": lambda tensors: _positions(_bert(tensors)),
    "prajjwal1/bert-tiny": lambda tensors: _positions(_bert(tensors)),
    "nlptown/bert-base-multilingual-uncased-sentiment": _positions,
    "FacebookAI/roberta-base": _roberta,
    "google-t5/t5-small": _t5,
    "google-t5/t5-base": _t5,
    "google/t5-v1_1-base": _untied_t5,
    "google/flan-t5-base": _untied_t5,
}
PICKLED = ("microsoft/DialoGPT-medium", "databricks/dolly-v2-3b", "lmsys/vicuna-7b-v1.5", "prajjwal1/bert-tiny")
SEVERAL_FILES = ("meta-llama/Llama-2-7b-hf", "lmsys/vicuna-7b-v1.5", "Qwen/QwQ-32B", "Qwen/Qwen3-30B-A3B")
_ARCHITECTURE = {"prajjwal1/bert-tiny": "BertForMaskedLM"}


def architecture(name: str) -> Any:
    """transformers' class of the model."""
    return getattr(transformers, _ARCHITECTURE.get(name) or CONFIGS[name]["architectures"][0])


def write(name: str, folder: Path) -> Path:
    """The model's directory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(7)
    model = architecture(name)(config).to(config.dtype or torch.float32)
    for parameter in dict.fromkeys(model.parameters()):
        torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.2)
    pickled = name in PICKLED
    tied = {} if pickled else model.all_tied_weights_keys
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    tensors = STORED.get(name, _nothing)(tensors)
    _write_tensors(tensors, folder, 2 if name in SEVERAL_FILES else 1, pickled)
    return folder


def _write_tensors(tensors: Tensors, folder: Path, files: int, pickled: bool) -> None:
    base, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map = {}
    for number in range(files):
        part = dict(list(tensors.items())[number::files])
        file = f"{base}.{ending}" if files == 1 else f"{base}-{number + 1:05d}-of-{files:05d}.{ending}"
        weight_map |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file({key: tensor.contiguous() for key, tensor in part.items()}, folder / file, {"format": "pt"})
    if files > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{base}.{ending}.index.json").write_text(json.dumps(index))
