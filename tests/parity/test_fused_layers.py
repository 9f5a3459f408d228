"""Layers whose operations are joined train as plain PyTorch does, and as the layers do whose operations run one by one.

Most layouts run the joined functions uncompiled (``torch.compiler.set_stance``), since compiling costs seconds in each
rank; what is compiled is the same functions. fp32 tolerances are those of ``test_truth.py``. In bf16 the joined
operations round once where the others round each: after some steps of a small model, losses differ by less than 1 %.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_megatron import Experts, GPTModule, Kernels
from tests.reference import parallel_bert, parallel_gpt, parallel_t5, plain_bert, plain_gpt, plain_t5
from tests.reference.parallel_gpt import LoadedGPT, Watch
from tests.support import small_gpt
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

ROWS, STEPS, CLIP = 12, 4, 0.5
FUSED, PLAIN = Kernels(fused_layers=True), Kernels(fused_layers=False)
LLAMA = replace(plain_gpt.LLAMA, num_layers=4)
GPT2 = replace(plain_gpt.GPT2, num_layers=4)


@contextmanager
def uncompiled() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def uncompiled_call(function: Any, *args: Any, **options: Any) -> Any:
    """What a rank calls."""
    with uncompiled():
        return function(*args, **options)


train_uncompiled = functools.partial(uncompiled_call, parallel_gpt.train)


@functools.cache
def truth(name: str) -> dict:
    config = globals()[name]
    return plain_gpt.train(config, parallel_gpt.text_samples(config, ROWS * STEPS), ROWS, STEPS, CLIP)


def assert_truth(name: str, layout: Layout, train: Any = train_uncompiled, **options: Any) -> None:
    expected = truth(name)
    train = functools.partial(train, full=expected["weights"], kernels=FUSED, **options)
    for seen in run_in_pool(layout.world_size, train, globals()[name], layout, ROWS, STEPS, CLIP, timeout=400):
        assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert seen["distance"] < 1e-5


LAYOUTS = [Layout(), Layout(tp=2, pp=2, sp=True), Layout(pp=2, vp=2, dp=2), Layout(tp=2, dp=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["GPT2", "LLAMA"])
def test_fused_layers_match_plain_pytorch(name, layout):
    assert_truth(name, layout)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_fused_layers_match_plain_pytorch_when_recomputed(recompute):
    assert_truth("LLAMA", Layout(tp=2), recompute=recompute)


BERTS = [(name, layout) for layout in (Layout(), Layout(tp=2, pp=2, sp=True)) for name in ("pretraining", "pre_norm")]
BERTS.append(("modern", Layout(pp=2)))


@pytest.mark.parametrize(("name", "layout"), BERTS, ids=str)
def test_a_fused_bert_matches_transformers(name, layout):
    expected = plain_bert.train(name, ROWS, 10)
    train = functools.partial(uncompiled_call, parallel_bert.train, kernels=FUSED)
    for seen in run_in_pool(layout.world_size, train, name, layout, ROWS, 10, expected["weights"]):
        assert [step["train_loss"] for step in seen["steps"]] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen["distance"] < 1e-4


@pytest.mark.parametrize("name", ["t5", "t5_v1_1"])
def test_a_fused_t5_matches_transformers(name):
    expected, layout = plain_t5.train(name, ROWS, 10, None), Layout(tp=2, pp=2, sp=True)
    train = functools.partial(uncompiled_call, parallel_t5.train, kernels=FUSED)
    for seen in run_in_pool(layout.world_size, train, name, layout, ROWS, 10, expected["weights"]):
        assert [step["train_loss"] for step in seen["steps"]] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen["distance"] < 1e-4


def fit(
    kernels: Kernels,
    load: Any = None,
    steps: int = 4,
    precision: str = "32-true",
    p: float = 0.2,
    shape: Any = None,
    **options: Any,
) -> Any:
    """The Trainer, losses and final weights of one rank, with dropout."""
    config = replace(LLAMA, num_layers=2, hidden_dropout=p, attention_dropout=0.1, **(shape or {}))
    watch, module = Watch(), LoadedGPT(config)
    with uncompiled():
        run, _ = small_gpt.fit(
            steps=steps, load=load, callbacks=[watch], module=module, precision=precision,
            strategy={"kernels": kernels, **options},
        )  # fmt: skip
    return run, watch.losses, [parameter.detach().clone() for parameter in module.parameters()]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_dropout_draws_what_the_plain_layers_draw():
    """On a CPU; on a GPU torch's own dropout draws in another order, and only the distribution is the same."""
    _, fused, _ = fit(FUSED)
    _, plain, _ = fit(PLAIN)
    assert fused == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        {"parallel_residual": True, "rotary_percent": 0.5, "normalization": "LayerNorm", "bias": True},
        {"extra": {"qk_layernorm": True, "layernorm_zero_centered_gamma": True}},
        {"experts": Experts(num=6, top_k=3, ffn_hidden_size=24, shared_ffn_hidden_size=20, layers=[1])},
    ],
    ids=["parallel-residual", "normed-heads", "experts"],
)
def test_other_shapes_train_as_with_the_plain_layers(shape, monkeypatch):
    monkeypatch.setattr(LoadedGPT, "configure_model", GPTModule.configure_model)  # with its own first weights
    assert fit(FUSED, p=0.0, shape=shape)[1] == pytest.approx(fit(PLAIN, p=0.0, shape=shape)[1], rel=1e-5)


def test_recomputed_layers_drop_the_same_to_the_bit():
    _, losses, kept = fit(FUSED)
    assert equal(fit(FUSED, recompute="full")[2], kept)
    # Norms that are recomputed run apart from the sums, and round otherwise.
    assert fit(FUSED, recompute="selective")[1] == pytest.approx(losses, rel=1e-5)
    assert not equal(fit(FUSED, p=0.3)[2], kept), "dropout does nothing"


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    _, losses, weights = fit(FUSED)
    fit(FUSED, steps=2)[0].save_checkpoint(tmp_path / "half")
    _, resumed, again = fit(FUSED, load=tmp_path / "half")
    assert resumed == losses[2:]
    assert equal(again, weights)


def test_bf16_is_within_one_percent():
    _, fused, _ = fit(FUSED, precision="bf16-mixed")
    _, plain, _ = fit(PLAIN, precision="bf16-mixed")
    assert fused == pytest.approx(plain, rel=1e-2)
    assert fused != plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2", "LLAMA"])
def test_compiled_layers_match_plain_pytorch(name):
    assert_truth(name, Layout(), parallel_gpt.train)
