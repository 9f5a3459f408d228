"""The truth of generation: transformers' own models, and adapters that start from their weights."""

import functools
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_megatron import GPTConfig, GPTModule, T5Module
from tests import plain_t5
from tests.parallel import FromTruth
from tests.plain_gpt import Weights

NEW = 12
# Odd sizes: 6 heads, a vocabulary that nothing divides.
GPT2 = GPTConfig(
    num_layers=4,
    hidden_size=24,
    num_attention_heads=6,
    vocab_size=211,
    seq_length=48,
    activation="gelu_tanh",
    make_vocab_size_divisible_by=8,
)
LLAMA = GPTConfig(
    num_layers=4,
    hidden_size=48,
    num_attention_heads=6,
    num_query_groups=2,
    ffn_hidden_size=40,
    vocab_size=211,
    seq_length=48,
    position_embedding="rope",
    normalization="RMSNorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
    make_vocab_size_divisible_by=8,
)
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "t5": plain_t5.CONFIGS["t5"], "t5_v1_1": plain_t5.CONFIGS["t5_v1_1"]}


@functools.cache
def model(name: str) -> Any:
    if name.startswith("t5"):
        return plain_t5.new_model(name).eval()
    found = (_gpt2 if name == "gpt2" else _llama)().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in found.named_parameters():
            # Large enough that a text does not repeat one token.
            drawn = torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.dim() == 1 else 0.4)
            parameter.copy_(1 + drawn if "norm" in key or "ln_" in key else drawn)
    return found


def prompts(name: str) -> dict[str, torch.Tensor]:
    """Three of different lengths, padded on the left; of a T5, on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 211, (3, 7), generator=generator)
    mask = torch.arange(7) >= torch.tensor([[0], [3], [6]])
    if name.startswith("t5"):
        mask = mask.flip(1)
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


@functools.cache
def truth(name: str, **options: Any) -> torch.Tensor:
    """What transformers writes."""
    with torch.random.fork_rng():
        torch.manual_seed(options.pop("seed", 0))
        options = {"max_new_tokens": NEW, "pad_token_id": 0, "top_k": 0, **options}
        if not options.get("do_sample"):
            options.pop("top_k")
        return model(name).generate(**prompts(name), **options)


class _Writer(FromTruth):
    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(CONFIGS[name], **options)
        self.truth = name

    def initial_weights(self) -> Weights:
        return megatron_weights(self.truth)


class GPTWriter(_Writer, GPTModule):
    """Starts from the truth's weights."""


class T5Writer(_Writer, T5Module):
    """Starts from the truth's weights."""


def writer(name: str) -> Any:
    return (T5Writer if name.startswith("t5") else GPTWriter)(name)


def megatron_weights(name: str) -> Weights:
    if name.startswith("t5"):
        return plain_t5.megatron_weights(model(name))
    return (_from_gpt2 if name == "gpt2" else _from_llama)(model(name).state_dict())


def _gpt2() -> Any:
    c = GPT2
    sizes = {"n_layer": c.num_layers, "n_embd": c.hidden_size, "n_head": c.num_attention_heads}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, vocab_size=c.vocab_size, n_positions=c.seq_length, bos_token_id=None, eos_token_id=None)
    )


def _llama() -> Any:
    c = LLAMA
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=c.num_layers,
            hidden_size=c.hidden_size,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_query_groups,
            intermediate_size=c.ffn_hidden_size,
            vocab_size=c.vocab_size,
            max_position_embeddings=c.seq_length,
            rms_norm_eps=c.layernorm_epsilon,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _from_gpt2(state: Weights) -> Weights:
    found = {
        "embedding.word_embeddings.weight": state["transformer.wte.weight"],
        "embedding.position_embeddings.weight": state["transformer.wpe.weight"],
    }
    pairs = {
        "self_attention.linear_qkv": "attn.c_attn",
        "self_attention.linear_proj": "attn.c_proj",
        "mlp.linear_fc1": "mlp.c_fc",
        "mlp.linear_fc2": "mlp.c_proj",
        "input_layernorm": "ln_1",
        "pre_mlp_layernorm": "ln_2",
    }
    for n in range(GPT2.num_layers):
        for ours, theirs in pairs.items():
            for kind in ("weight", "bias"):
                value = state[f"transformer.h.{n}.{theirs}.{kind}"].T  # its linear layers are [in, out]
                if "qkv" in ours:
                    value = value.unflatten(0, (3, GPT2.num_attention_heads, -1)).transpose(0, 1).flatten(0, 2)
                found[f"decoder.layers.{n}.{ours}.{kind}"] = value
    for kind in ("weight", "bias"):
        found[f"decoder.final_layernorm.{kind}"] = state[f"transformer.ln_f.{kind}"]
    return found


def _from_llama(state: Weights) -> Weights:
    found = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    for n in range(LLAMA.num_layers):
        theirs, ours = f"model.layers.{n}.", f"decoder.layers.{n}."
        q, k, v = (state[f"{theirs}self_attn.{x}_proj.weight"].unflatten(0, (2, -1, 8)) for x in "qkv")
        gate, up = (state[f"{theirs}mlp.{x}_proj.weight"] for x in ("gate", "up"))
        found |= {
            f"{ours}self_attention.linear_qkv.weight": torch.cat([q, k, v], 1).flatten(0, 2),
            f"{ours}self_attention.linear_proj.weight": state[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}mlp.linear_fc1.weight": torch.cat([gate, up]),
            f"{ours}mlp.linear_fc2.weight": state[f"{theirs}mlp.down_proj.weight"],
            f"{ours}input_layernorm.weight": state[f"{theirs}input_layernorm.weight"],
            f"{ours}pre_mlp_layernorm.weight": state[f"{theirs}post_attention_layernorm.weight"],
        }
    return found
