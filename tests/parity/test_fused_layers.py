"""Layers whose operations are joined train as plain PyTorch does, and as the layers do whose operations run one by one.

Most layouts run the joined functions uncompiled (``torch.compiler.set_stance``), since compiling costs seconds in each
rank; what is compiled is the same functions. fp32 tolerances are those of ``test_truth.py``.
"""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_megatron import Kernels
from tests.reference import parallel_gpt, plain_gpt
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

ROWS, STEPS, CLIP = 12, 4, 0.5
FUSED, PLAIN = Kernels(fused_layers=True), Kernels(fused_layers=False)
LLAMA = replace(plain_gpt.LLAMA, num_layers=4)
GPT2 = replace(plain_gpt.GPT2, num_layers=4)


def train_uncompiled(*args: Any, **options: Any) -> dict[str, Any]:
    torch.compiler.set_stance("force_eager")
    try:
        return parallel_gpt.train(*args, **options)
    finally:
        torch.compiler.set_stance("default")


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


@pytest.mark.parametrize("name", ["GPT2", "LLAMA"])
def test_compiled_layers_match_plain_pytorch(name):
    assert_truth(name, Layout(), parallel_gpt.train)
