"""Recomputed activations: gradients stay the same to the bit, and the backward pass keeps fewer bytes."""

import functools

import pytest
import torch

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule, Kernels, T5Config, T5Module
from lightning_megatron.models.recompute import check
from lightning_megatron.training.saved_bytes import SavedBytes
from tests.support.built import built

SIZES = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256, "seq_length": 32}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
ROWS, LENGTH = 2, 32
UNIT = ROWS * LENGTH * SIZES["hidden_size"] * 4  # bytes of one hidden state
MODULES = {
    "gpt": lambda: GPTModule(GPTConfig(**SIZES)),
    "gpt with dropout": lambda: GPTModule(GPTConfig(**SIZES, **DROPOUT)),
    "llama with dropout": lambda: GPTModule(
        GPTConfig(
            **SIZES,
            **DROPOUT,
            num_query_groups=2,
            normalization="RMSNorm",
            activation="swiglu",
            bias=False,
            position_embedding="rope",
            tie_embeddings=False,
        )  # fmt: skip
    ),
    "parallel": lambda: GPTModule(GPTConfig(**SIZES, parallel_residual=True)),
    "bert": lambda: BertModule(BertConfig(**SIZES, **DROPOUT)),
    "bert pre": lambda: BertModule(BertConfig(**SIZES, norm_placement="pre")),
    "t5": lambda: T5Module(T5Config(**SIZES, **DROPOUT)),
    "t5 gated": lambda: T5Module(T5Config(**SIZES, activation="geglu_tanh", position_embedding="learned")),
}


@functools.cache
def step(name: str, recompute=None, fused: bool = False) -> tuple[float, dict, float, float]:
    """The loss, the gradients, and the units kept after the forward pass and at most."""
    recompute = list(recompute) if isinstance(recompute, tuple) else recompute
    kernels = Kernels(fused_layers=fused).on(torch.device("cpu"))
    module = built(MODULES[name](), recompute=recompute, kernels=kernels)
    tokens = torch.randint(5, 256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    inputs = module.get_batch({"input_ids": tokens, "labels": tokens})
    with SavedBytes(module.parameters()) as saved:
        loss = module.active_model(**inputs).float().square().mean()
        kept = saved.now
        if not fused:
            loss.backward()
    if fused:  # whose backward passes use torch.func, which refuses to run under hooks on saved tensors
        loss.backward()
    assert saved.now == 0
    gradients = {each: p.grad for each, p in module.named_parameters() if p.grad is not None}
    return float(loss), gradients, kept / UNIT, saved.peak / UNIT


@pytest.mark.parametrize("recompute", ["selective", "full", 1, ("layernorm",), ("mlp", "core_attn"), ("mlp_act",)])
@pytest.mark.parametrize("name", MODULES)
def test_the_same_gradients_from_fewer_bytes(name, recompute):
    loss, gradients, kept, most = step(name)
    again = step(name, recompute)
    assert again[0] == loss
    assert again[1].keys() == gradients.keys()
    assert all(torch.equal(again[1][each], gradients[each]) for each in gradients)
    assert again[2] < kept - 0.9 or (recompute == ("mlp_act",) and name == "t5")  # ReLU keeps its output alone
    assert again[3] <= most


@pytest.mark.parametrize("recompute", ["selective", "full", ("mlp", "layernorm")])
@pytest.mark.parametrize("name", ["gpt with dropout", "llama with dropout", "parallel", "bert", "bert pre", "t5"])
def test_fused_layers_recompute_too(name, recompute):
    torch.compiler.set_stance("force_eager")  # the same functions, without waiting for their compilation
    try:
        loss, gradients, kept, _ = step(name, fused=True)
        again = step(name, recompute, fused=True)
    finally:
        torch.compiler.set_stance("default")
    for each, gradient in gradients.items():  # norms that are freed are not joined with the sums before them
        torch.testing.assert_close(again[1][each], gradient, rtol=1e-4, atol=1e-5)
    assert again[0] == pytest.approx(loss, rel=1e-6)
    assert again[2] < kept - 4


# Hidden states of a layer that are no longer kept, by module.
SAVED = {
    ("gpt", ("layernorm",)): 2,
    ("gpt", ("mlp_act",)): 4,  # the output of the activation
    ("gpt", ("mlp",)): 8,  # and of the projection before it
    ("gpt", "selective"): 6,
    ("llama with dropout", ("mlp_act",)): 12,  # of three tensors; megatron-core adds its offset, 0, to one
    ("parallel", "selective"): 6,
    ("bert pre", "selective"): 6,
}


@pytest.mark.parametrize(("name", "recompute"), SAVED, ids=str)
def test_what_each_module_saves(name, recompute):
    saved = step(name)[2] - step(name, recompute)[2]
    assert saved == pytest.approx(SAVED[name, recompute] * SIZES["num_layers"], rel=0.02)


def test_the_last_norm_behind_a_residual_sum_stays():
    """Of a post-LayerNorm stack of three layers, five norms of six are recomputed."""
    assert step("bert")[2] - step("bert", ("layernorm",))[2] == pytest.approx(5, rel=0.02)


def test_a_number_of_layers():
    one, two, all_of_them = (step("gpt", number)[2] for number in (1, 2, 3))
    assert one - two == pytest.approx(two - all_of_them)
    assert all_of_them == step("gpt", "full")[2]


def test_evaluation_keeps_outputs():
    module = built(MODULES["gpt"](), recompute="selective").eval()
    inputs = module.get_batch({"input_ids": torch.arange(LENGTH)[None]})
    with torch.no_grad():
        first, again = (module.active_model(**inputs) for _ in range(2))
    assert torch.equal(first, again)
    module.active_model(**inputs).sum().backward()  # with a gradient, too


@pytest.mark.parametrize(
    ("recompute", "told"),
    [
        ("all", "use None or 'selective' or 'full', a number of layers"),
        (0, "a number of layers"),
        (True, "a number of layers"),
        ([], "a list of modules"),
        (["moe_act"], "'moe_act' is 'mlp_act' here, of layers with experts, too"),
        (["layer_norm"], "Did you mean 'layernorm'?"),
    ],
    ids=str,
)
def test_refused(recompute, told):
    with pytest.raises(ValueError, match=r"^MegatronStrategy\(recompute=") as error:
        check(recompute)
    assert told in str(error.value)
