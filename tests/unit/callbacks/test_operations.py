"""The operations that a callback computes are those that torch counts."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from lightning_megatron import BertConfig, Experts, GPTConfig, T5Config
from lightning_megatron.models.flops import training_flops


def counted(model: torch.nn.Module, **inputs: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        model(**inputs).logits.float().sum().backward()
    return counter.get_total_flops()


def test_operations_are_those_that_torch_counts():
    """torch counts whole score matrices, and nothing of norms and activations; the first layer's input needs no
    gradient but for the embedding's sake, so both count alike."""
    ids = torch.randint(0, 61, (1, 64))
    common = {"hidden_size": 48, "num_attention_heads": 4, "vocab_size": 61, "seq_length": 64}
    half = 2 * 2 * 64 * 64 * 48 * 0.5 * 3 * 2  # of two layers' scores, which are there but not needed

    llama = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, attn_implementation="eager",
    )  # fmt: skip
    gpt = GPTConfig(num_layers=2, num_query_groups=2, ffn_hidden_size=80, activation="swiglu", **common)
    expected = counted(transformers.LlamaForCausalLM(llama), input_ids=ids)
    assert training_flops(gpt, (64,)) + half == pytest.approx(expected, rel=0.01)  # rotary frequencies are a product

    mixtral = transformers.MixtralConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, num_local_experts=6, num_experts_per_tok=3, attn_implementation="eager",
        experts_implementation="eager",
    )  # fmt: skip
    experts = Experts(num=6, top_k=3, ffn_hidden_size=40)
    mixture = replace(gpt, experts=experts, bias=False)
    expected = counted(transformers.MixtralForCausalLM(mixtral), input_ids=ids)
    assert training_flops(mixture, (64,)) + half == pytest.approx(expected, rel=0.01)
    some = replace(mixture, experts=replace(experts, layers=[1], shared_ffn_hidden_size=24))
    dense, all_of_them = training_flops(gpt, (64,)), training_flops(mixture, (64,))
    assert training_flops(some, (64,)) == (dense + all_of_them) / 2 + 2 * 64 * 48 * 24 * 3 * 3

    bert = transformers.BertConfig(
        hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
        attn_implementation="eager",
    )  # fmt: skip
    head = 2 * 64 * 48 * 48 * 3  # the head's own layer
    expected = counted(transformers.BertForMaskedLM(bert), input_ids=ids)
    assert training_flops(BertConfig(num_layers=2, **common), (64,)) + head == pytest.approx(expected, rel=0.01)

    t5 = transformers.T5Config(
        d_model=48, d_kv=12, d_ff=192, num_layers=2, num_decoder_layers=3, num_heads=4, vocab_size=61
    )
    config = T5Config(num_layers=2, decoder_num_layers=3, decoder_seq_length=32, **common)
    scores = 2 * 2 * 32 * 32 * 48 * 0.5 * 3 * 3
    expected = counted(transformers.T5ForConditionalGeneration(t5), input_ids=ids, decoder_input_ids=ids[:, :32])
    assert training_flops(config, (64, 32)) + scores == pytest.approx(expected, rel=0.01)
