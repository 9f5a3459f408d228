"""Low-rank updates of experts train as those of a plain mixture do, however experts and tokens are divided."""

import functools
from typing import Any

import pytest

from lightning_megatron import Kernels, LoRA
from tests.reference import plain_experts, updated_experts
from tests.reference.parallel_experts import STEPS
from tests.reference.same_training import CLIP, ROWS, assert_gpt_trained_alike
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

EXPERTS = ["experts.linear_fc1", "experts.linear_fc2"]
LORAS = {
    "MIXTURE": LoRA(rank=3, alpha=6, targets=[*EXPERTS, "linear_proj"]),
    "ODD": LoRA(
        rank=2, alpha=6, targets=[*EXPERTS, "shared_experts.linear_fc2"], also_train=["decoder.layers.2.mlp.router"]
    ),
    "BIASED": LoRA(rank=2, alpha=4, targets=EXPERTS[:1]),
}


@functools.cache
def truth(name: str) -> dict:
    found = updated_experts.train(getattr(plain_experts, name), LORAS[name], ROWS, STEPS, CLIP)
    assert found["seen"].margin > 2e-5, f"a choice is too close for a comparison: {found['seen'].margin}"
    return found


def assert_same_training(name: str, layout: Layout, **options: Any) -> None:
    train = functools.partial(updated_experts.train_on_rank, full=truth(name)["weights"], **options)
    ranks = run_in_pool(
        layout.world_size, train, getattr(plain_experts, name), LORAS[name], layout, ROWS, STEPS, CLIP, timeout=600
    )
    assert_gpt_trained_alike(ranks, truth(name))
    assert not any(seen["held"] for seen in ranks)  # gradients of frozen weights


@pytest.mark.parametrize("name", LORAS)
def test_one_process(name):
    assert_same_training(name, Layout(), micro_batch_size=4)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, ep=2),
        Layout(dp=2, etp=2),
        Layout(dp=2, etp=2, sharded=False),
        Layout(tp=2, sp=True),
        Layout(tp=2, sp=True, ep=2, etp=1),
        Layout(dp=4, ep=2, etp=2),
        Layout(dp=4, ep=2, etp=2, sharded=False),
        Layout(tp=2, dp=2, ep=2, sp=True),
    ],
    ids=str,
)
def test_divided_experts(layout):
    assert_same_training("MIXTURE", layout)


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2, ep=2, etp=1, sp=True), Layout(dp=4, ep=2, etp=2)], ids=str)
def test_shared_experts_and_a_router_that_is_trained_whole(layout):
    assert_same_training("ODD", layout, recompute=["mlp_act"], kernels=Kernels(expert_dispatch="allgather"))


def test_biases_of_a_frozen_router_stay():
    assert_same_training("BIASED", Layout(dp=2, ep=2))
