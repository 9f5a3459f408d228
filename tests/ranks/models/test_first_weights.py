"""One seed starts one model, whatever the layout."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule, LoRA, T5Config, T5Module
from lightning_megatron.hf.gather import WholeTensors
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import Logged, loader, trainer

ROWS, STEPS = 8, 2
SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 600,  # a rank's part ends inside of a tile
    "vocab_size": 61,  # padded to 64 rows, or 128
    "seq_length": 8,
    "make_vocab_size_divisible_by": 32,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
LLAMA = {"position_embedding": "rope", "normalization": "RMSNorm", "activation": "swiglu", "bias": False}
LAYOUTS = [Layout(tp=2, pp=2, vp=2), Layout(tp=4, sp=True), Layout(pp=2, dp=2)]
KINDS = ["gpt", "llama", "xavier", "lora", "bert", "t5"]


def _module(kind: str) -> Any:
    make = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3)
    if kind == "bert":
        return BertModule(BertConfig(task="pretraining", **SIZES), make)
    if kind == "t5":
        return T5Module(T5Config(**SIZES), make)
    if kind == "llama":
        return GPTModule(GPTConfig(num_query_groups=4, tie_embeddings=False, **LLAMA, **SIZES), make)
    extra = {"init_method": torch.nn.init.xavier_normal_} if kind == "xavier" else {"embedding_init_method_std": 0.5}
    return GPTModule(GPTConfig(extra=extra, **SIZES), make, lora=LoRA(rank=2) if kind == "lora" else None)


def _samples(kind: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    samples = []
    for number in range(ROWS * STEPS):
        ids = torch.randint(61, (8,), generator=generator)
        sample = {"input_ids": ids, "labels": ids}
        samples.append(sample | ({"next_sentence_label": torch.tensor(number % 2)} if kind == "bert" else {}))
    return samples


def _train(kinds: list[str], layouts: list[Layout]) -> dict[tuple[str, str], Any]:
    """The whole model's first weights, on the first rank, and the losses of a training from them."""
    found = {}
    for layout in layouts:
        for kind in kinds:
            seed_everything(3)
            module, logged, first = _module(kind), Logged(), {}
            module.on_fit_start = lambda module=module, first=first: first.update(
                {key: None if tensor is None else tensor.clone() for key, tensor in WholeTensors(module)}
            )
            run = trainer(layout, max_steps=STEPS, callbacks=[logged])
            run.fit(module, loader(_samples(kind), layout, ROWS, run))
            found[str(layout), kind] = first, [step["train_loss"] for step in logged.steps]
    return found


@pytest.fixture(scope="module")
def truth():
    return {kind: seen for (_, kind), seen in run_in_pool(1, _train, KINDS, [Layout()])[0].items()}


@pytest.fixture(scope="module")
def parallel():
    return run_in_pool(4, _train, KINDS, LAYOUTS, timeout=240)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_under_every_layout(kind, layout, truth, parallel):
    (whole, losses), (seen, others) = truth[kind], parallel[str(layout), kind]
    assert seen.keys() == whole.keys()
    assert [key for key, tensor in whole.items() if not torch.equal(tensor, seen[key])] == []
    assert others == pytest.approx(losses, rel=1e-5)  # sums in another order


def test_the_spread_is_megatrons(truth):
    small = 0.02 / math.sqrt(2 * SIZES["num_layers"])  # what ends in the residual stream
    weights = truth["gpt"][0]
    assert float(weights["embedding.word_embeddings.weight"].std()) == pytest.approx(0.5, rel=0.1)
    assert float(weights["embedding.position_embeddings.weight"].std()) == pytest.approx(0.5, rel=0.2)
    for number in range(4):
        layer = f"decoder.layers.{number}."
        assert float(weights[f"{layer}mlp.linear_fc1.weight"].std()) == pytest.approx(0.02, rel=0.05)
        assert float(weights[f"{layer}mlp.linear_fc2.weight"].std()) == pytest.approx(small, rel=0.05)
        assert float(weights[f"{layer}self_attention.linear_proj.weight"].std()) == pytest.approx(small, rel=0.1)
        assert not weights[f"{layer}mlp.linear_fc1.bias"].any()
    xavier = truth["xavier"][0]["decoder.layers.1.mlp.linear_fc1.weight"]  # of the whole shape, (600, 32)
    assert float(xavier.std()) == pytest.approx(math.sqrt(2 / 632), rel=0.05)
    queries, keys, _ = (
        truth["t5"][0]["decoder.layers.0.self_attention.linear_qkv.weight"].unflatten(0, (-1, 3, 8)).unbind(1)
    )
    assert float(queries.std() / keys.std()) == pytest.approx(1 / math.sqrt(8), rel=0.2)  # T5's


def test_no_weight_is_like_another(truth):
    drawn = [tensor.flatten()[:1000] for key, tensor in truth["llama"][0].items() if tensor.dim() == 2]
    likeness = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert float(likeness.abs().max()) < 0.15  # five times what chance gives
