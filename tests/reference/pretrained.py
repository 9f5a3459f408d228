"""Small models of transformers, one or two of each family, with odd shapes; and how each is trained in one process."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch.utils.data import DataLoader

from lightning_megatron import AutoModule
from tests.reference.plain_gpt import ADAM
from tests.support.layout import Layout
from tests.support.trainer import Logged, loader, trainer

VOCAB, LENGTH, DECODER_LENGTH, ROWS, STEPS = 211, 37, 23, 8, 10
_COMMON = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.1}
_COMMON |= {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 64}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_SPARSE = {**_GROUPED, "num_hidden_layers": 5, "intermediate_size": 32, "num_experts_per_tok": 3}
_LATENT = {
    **_COMMON, **{"num_hidden_layers": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_routed_experts": 6},
    "kv_lora_rank": 14, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12, "first_k_dense_replace": 1,
    "n_shared_experts": 2, "routed_scaling_factor": 1.7, "num_key_value_heads": 6,
}  # fmt: skip
_DEEPSEEKS_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
_DEEPSEEKS_YARN |= {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.8, "mscale_all_dim": 0.6}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "vocab_size": VOCAB, "initializer_range": 0.1}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ROBERTA = {**_COMMON, **_NO_DROPOUT, "pad_token_id": 0, "type_vocab_size": 1}
_MODERN = {**_COMMON, "local_attention": 10, "norm_eps": 1e-3, "pad_token_id": 0, "hidden_activation": "gelu"}
_MODERN |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
_T5 = {"vocab_size": VOCAB, "d_model": 48, "d_kv": 10, "d_ff": 64, "num_heads": 6, "dropout_rate": 0.0}
_T5 |= {"num_layers": 2, "num_decoder_layers": 2, "decoder_start_token_id": 0}
_ANSWERS = {0: "no", 1: "perhaps", 2: "yes"}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 16}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
_GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}

MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, **_IDS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_COMMON, **_IDS)),
    "gpt_neox-behind": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_COMMON, **_IDS, use_parallel_residual=False)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, head_dim=10, rope_parameters=_LLAMA3)),
    "llama-biased": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True, rope_parameters=_YARN, tie_word_embeddings=True)
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=7)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=12, tie_word_embeddings=True)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GROUPED, head_dim=12)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **_GROUPED,
            head_dim=12,
            sliding_window=7,
            query_pre_attn_scalar=11,
            attn_logit_softcapping=0.3,
            final_logit_softcapping=4.0,
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **_GROUPED,
            head_dim=12,
            sliding_window=9,
            query_pre_attn_scalar=11,
            final_logit_softcapping=5.0,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=_GEMMA3,
        )
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED, **_IDS, sliding_window=9)),
    "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**_GROUPED, **_IDS, sliding_window=11)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(
        hf.SmolLM3Config(**_GROUPED, **_IDS, no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=5)
    ),
    "granite": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(
            **_GROUPED, embedding_multiplier=3.0, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=0.7
        )
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_GROUPED, **_IDS)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_GROUPED, partial_rotary_factor=0.25)),
    "glm4": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**_GROUPED, **_IDS, head_dim=12)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_SPARSE, num_local_experts=6, sliding_window=9)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **{**_SPARSE, "num_hidden_layers": 6},
            num_experts=6,
            norm_topk_prob=True,
            head_dim=12,
            moe_intermediate_size=20,
            mlp_only_layers=[1],
        )
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **_SPARSE,
            num_experts=6,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=28,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=3,
            decoder_sparse_step=2,
        )
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **_SPARSE,
            **_IDS,
            num_local_experts=6,
            head_dim=10,
            sliding_window=5,
            swiglu_limit=0.4,
            rope_parameters={**_YARN, "truncate": False},
        )
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**_SPARSE, **_IDS, num_experts=6)),
    "granitemoe": lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(
            **_SPARSE,
            num_local_experts=6,
            embedding_multiplier=3.0,
            residual_multiplier=0.3,
            attention_multiplier=0.2,
            logits_scaling=0.7,
        )
    ),
    "deepseek_v3": lambda: _with_biases(
        hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(
                **_LATENT, **_IDS, q_lora_rank=22, n_group=3, topk_group=2, rope_parameters=_DEEPSEEKS_YARN
            )
        )
    ),
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(
            **_LATENT,
            q_lora_rank=22,
            n_group=3,
            topk_group=2,
            topk_method="group_limited_greedy",
            rope_parameters=_DEEPSEEKS_YARN,
        )
    ),
    "deepseek_v2-lite": lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(**_LATENT, **_IDS, q_lora_rank=None, n_group=1, topk_group=1)
    ),
    "bert-masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**_COMMON, **_NO_DROPOUT)),
    "bert-pretraining": lambda: hf.BertForPreTraining(hf.BertConfig(**_COMMON, **_NO_DROPOUT)),
    "bert-sequences": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**_COMMON, **_NO_DROPOUT, id2label=_ANSWERS, problem_type="single_label_classification")
    ),
    "bert-tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**_COMMON, **_NO_DROPOUT, num_labels=5)),
    "bert-answers": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**_COMMON, **_NO_DROPOUT)),
    "roberta-masked": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_ROBERTA)),
    "roberta-sequences": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**_ROBERTA, id2label=_ANSWERS, problem_type="single_label_classification")
    ),
    "roberta-tokens": lambda: hf.RobertaForTokenClassification(hf.RobertaConfig(**_ROBERTA, num_labels=5)),
    "llama-sequences": lambda: hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**_GROUPED, id2label=_ANSWERS, problem_type="single_label_classification", pad_token_id=0)
    ),
    "gpt2-tokens": lambda: hf.GPT2ForTokenClassification(
        hf.GPT2Config(**_GPT2, **_IDS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, num_labels=5, classifier_dropout=0.0)
    ),
    "roberta-answers": lambda: hf.RobertaForQuestionAnswering(hf.RobertaConfig(**_ROBERTA)),
    "xlm-roberta-masked": lambda: hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**_ROBERTA)),
    "camembert-sequences": lambda: hf.CamembertForSequenceClassification(
        hf.CamembertConfig(**_ROBERTA, id2label=_ANSWERS, problem_type="single_label_classification")
    ),
    "modernbert-masked": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(
            **_MODERN,
            rope_parameters={
                "full_attention": {**_YARN, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        )
    ),
    "modernbert-answers": lambda: hf.ModernBertForQuestionAnswering(
        hf.ModernBertConfig(
            **_MODERN,
            **dict.fromkeys(("attention_bias", "mlp_bias", "classifier_bias", "norm_bias"), True),
        )
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "t5-1.1": lambda: _untied(
        hf.T5ForConditionalGeneration(hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    ),
}


def writes(name: str) -> bool:
    """Whether a model predicts tokens of a text."""
    return not name.endswith(("-masked", "-pretraining", "-sequences", "-tokens", "-answers"))


LATENTS = ["deepseek_v2", "deepseek_v2-lite", "deepseek_v3"]
MIXTURES = [*LATENTS, "mixtral", "gpt_oss", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe"]
DENSE = [name for name in MODELS if name not in MIXTURES]
CAUSAL = [name for name in MODELS if writes(name) and not name.startswith("t5")]
# What differs from another model in its head, or in its names: one layout shows that.
FURTHER = ["bert-answers", "modernbert-answers", "roberta-answers", "xlm-roberta-masked", "camembert-sequences"]


def _with_biases(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(bias, std=0.1)
    return model


def _untied(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


@functools.cache
def new_model(name: str) -> hf.PreTrainedModel:
    """The model, every weight drawn so that none can be exchanged for another."""
    torch.manual_seed(len(name))
    model = MODELS[name]().eval()
    model.config.architectures = [type(model).__name__]
    for parameter in dict.fromkeys(model.parameters()):
        at = 1.0 if parameter.dim() == 1 and "gemma" not in name else 0.0
        torch.nn.init.normal_(parameter.data, mean=at, std=0.1)
    return model


@functools.cache
def load(name: str, folder: Path) -> hf.PreTrainedModel:
    """What transformers loads from a directory, which must hold the model's tensors and no others."""
    model, about = type(new_model(name)).from_pretrained(folder, output_loading_info=True)
    assert not any(about.values()), about
    return model.eval()


def samples(name: str) -> list[dict[str, torch.Tensor]]:
    """As many as training sees."""
    generator = torch.Generator().manual_seed(5)
    return [_sample(name, generator) for _ in range(ROWS * STEPS)]


def _sample(name: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    ids = 1 + draw(VOCAB - 1, LENGTH)  # transformers gives the padding's embedding no gradient
    labels = {
        "bert-masked": lambda: {"labels": torch.where(draw(3, LENGTH) == 0, ids, -100)},
        "bert-pretraining": lambda: {
            "labels": torch.where(draw(3, LENGTH) == 0, ids, -100),
            "next_sentence_label": draw(2, 1)[0],
        },
        "bert-sequences": lambda: {"labels": draw(3, 1)[0]},
        "bert-tokens": lambda: {"labels": draw(5, LENGTH)},
        "roberta-masked": lambda: {"labels": torch.where(draw(3, LENGTH) == 0, ids, -100)},
        "roberta-sequences": lambda: {"labels": draw(3, 1)[0]},
        "roberta-tokens": lambda: {"labels": draw(5, LENGTH)},
        "llama-sequences": lambda: {"labels": draw(3, 1)[0]},
        "gpt2-tokens": lambda: {"labels": draw(5, LENGTH)},
        "bert-answers": lambda: _answer(draw),
        "xlm-roberta-masked": lambda: {"labels": torch.where(draw(3, LENGTH) == 0, ids, -100)},
        "camembert-sequences": lambda: {"labels": draw(3, 1)[0]},
        "roberta-answers": lambda: _answer(draw),
        "modernbert-masked": lambda: {"labels": torch.where(draw(3, LENGTH) == 0, ids, -100)},
        "modernbert-answers": lambda: _answer(draw),
        "t5": lambda: {"labels": draw(VOCAB - 1, DECODER_LENGTH) + 1},
        "t5-1.1": lambda: {"labels": draw(VOCAB - 1, DECODER_LENGTH) + 1},
    }.get(name, lambda: {"labels": ids})
    return {"input_ids": ids, **labels()}


def _answer(draw: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """Which may begin before the row, or end behind it; then transformers counts its first token, or nothing."""
    return {"start_positions": draw(LENGTH + 3, 1)[0] - 1, "end_positions": draw(LENGTH + 3, 1)[0] - 1}


@torch.no_grad()
def logits(model: hf.PreTrainedModel, name: str) -> list[torch.Tensor]:
    """Of the first batch."""
    return logits_in(model(**_batch(name, 0)))


def logits_in(output: Any) -> list[torch.Tensor]:
    """Those of each head, in transformers' output."""
    return [value for key, value in output.items() if key.endswith("logits")]


@functools.cache
def truth(name: str) -> dict[str, Any]:
    """What transformers' model gives, and what it is after training with plain AdamW."""
    import copy

    before = logits(new_model(name), name)
    model = copy.deepcopy(new_model(name))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses = []
    for step in range(STEPS):
        loss = model(**_theirs(name, _batch(name, step))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"logits": before, "losses": losses, "weights": model.state_dict()}


def _batch(name: str, step: int) -> dict[str, torch.Tensor]:
    rows = samples(name)[step * ROWS : (step + 1) * ROWS]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _theirs(name: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


def run_on_rank(names: list[str], layout: Layout, folder: Path) -> dict[str, Any]:
    """Each model in turn: logits, training, and a directory before it and one after it; on this rank."""
    return {name: _run_one(name, layout, folder / name) for name in names}


def _run_one(name: str, layout: Layout, folder: Path) -> dict[str, Any]:
    module = AutoModule.from_pretrained(new_model(name), optimizer=functools.partial(torch.optim.AdamW, **ADAM))
    logged = Logged()
    run = trainer(layout, max_steps=STEPS, callbacks=[logged])
    rows: DataLoader = loader(samples(name)[:ROWS], layout, ROWS, run)
    predicted = [p if isinstance(p, tuple) else (p,) for p in run.predict(module, rows)]
    module.save_pretrained(folder / "before", max_shard_size="50KB")
    run.fit(module, loader(samples(name), layout, ROWS, run))
    module.save_pretrained(folder / "after")
    return {
        "logits": [torch.cat(parts) for parts in zip(*predicted, strict=True)],
        "losses": [step["train_loss"] for step in logged.steps],
    }
