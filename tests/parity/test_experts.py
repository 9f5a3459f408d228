"""Mixtures of experts train as a plain one in one process does, however their experts and tokens are divided.

``plain_experts`` says by how much each choice of an expert is the largest: rounding must not change it.
"""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_megatron import Kernels
from tests.reference import parallel_experts, plain_experts
from tests.reference.parallel_experts import STEPS, LoadedMixture, config_of, truth
from tests.reference.parallel_gpt import Rows, Watch, text_samples
from tests.reference.same_training import CLIP, ROWS, assert_gpt_trained_alike
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import loader, trainer

DISPATCHES = ["alltoall", "allgather"]


def assert_same_training(
    name: str, layout: Layout, accumulate: int = 1, cut: str = "", experts: dict | None = None, **options: Any
) -> None:
    expected = truth(name, cut, options.get("loss_reduction") == "micro_batch", **(experts or {}))
    ranks = run_in_pool(
        layout.world_size, functools.partial(parallel_experts.train, full=expected["weights"], **options),
        config_of(name, **(experts or {})), layout, ROWS, STEPS, CLIP, accumulate, timeout=240,
    )  # fmt: skip
    assert_gpt_trained_alike(ranks, expected, losses=accumulate == 1)


@pytest.mark.parametrize("name", ["MIXTURE", "ODD", "BIASED"])
def test_one_process_and_any_micro_batches(name):
    assert truth(name)["losses"] != pytest.approx(truth("MIXTURE", balancing="none", z_weight=0.0)["losses"], rel=1e-3)
    for size in (12, 4, 3):
        assert_same_training(name, Layout(), micro_batch_size=size)


DIVIDED = [
    Layout(dp=2, ep=2),
    Layout(dp=2, ep=2, sharded=False),
    Layout(dp=2, etp=2),
    Layout(tp=2, sp=True),
    Layout(tp=2, sp=True, etp=1),
    Layout(tp=2, sp=True, ep=2, etp=1),
    Layout(dp=4, ep=4),
    Layout(dp=4, ep=2, etp=2),
    Layout(tp=2, dp=2, ep=4, etp=1, sp=True),
    Layout(tp=2, dp=2, ep=2, sp=True, sharded=False),
]


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("layout", DIVIDED, ids=str)
def test_divided_experts(layout, dispatch):
    assert_same_training("MIXTURE", layout, kernels=Kernels(expert_dispatch=dispatch))


WITH_OTHERS = [
    Layout(pp=2),
    Layout(pp=2, vp=2, dp=2, ep=2),
    Layout(tp=2, pp=2, ep=2, etp=1, sp=True),
    Layout(tp=2, cp=2, ep=2, sp=True),
    Layout(dp=4, ep=2),
    Layout(tp=2, dp=2, ep=2, sp=True),
]


@pytest.mark.parametrize("layout", WITH_OTHERS, ids=str)
def test_shared_experts_in_some_layers_with_other_parallelisms(layout):
    assert_same_training("ODD", layout)


@pytest.mark.parametrize("name", ["MIXTURE", "ODD", "BIASED"])
def test_accumulation_is_one_big_batch(name):
    assert_same_training(name, Layout(dp=2, ep=2), accumulate=3)


def test_accumulation_with_a_replicated_optimizer():
    assert_same_training("MIXTURE", Layout(dp=4, ep=2, sharded=False), accumulate=3)


# bf16 has 8 significant bits, fp16 11; a choice between close experts may differ, and the runs go apart from there.
@pytest.mark.parametrize(("precision", "band"), [("bf16-mixed", 1e-2), ("bf16-true", 1e-2), ("16-mixed", 2e-3)])
def test_low_precision(precision, band):
    config = config_of("ODD")
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    samples = text_samples(config, ROWS * STEPS)
    expected = plain_experts.train(config, samples, ROWS, STEPS, CLIP, dtype=dtype)["losses"]
    train = functools.partial(parallel_experts.train, precision=precision, loss_scale=256.0)
    for layout in (Layout(), Layout(dp=2, ep=2)):
        for rank in run_in_pool(layout.world_size, train, config, layout, ROWS, STEPS, CLIP):
            assert rank["losses"] == pytest.approx(expected, rel=band), layout


class Overflowing(LoadedMixture):
    """In the second step the second rank's experts alone overflow."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == 1 and self.trainer.global_rank == 1 and not optimizer.skipped_steps:
            weights = self.chunks[0].named_parameters()
            next(weight for name, weight in weights if ".experts." in name).main_grad.fill_(torch.inf)


def skip(layout: Layout) -> tuple[int, float, list[float]]:
    module, watch = Overflowing(config_of("MIXTURE")), Watch()
    run = trainer(layout, {}, "16-mixed", 256.0, max_steps=4, callbacks=[watch])
    run.fit(module, loader(Rows(text_samples(module.config, ROWS * 4)), layout, ROWS, run))
    return run.strategy.optimizers[0].skipped_steps, run.strategy.optimizers[0].loss_scale, watch.losses


@pytest.mark.parametrize("sharded", [True, False])
def test_all_ranks_skip_a_step_in_which_an_expert_overflows(sharded):
    first, second = run_in_pool(2, skip, Layout(dp=2, ep=2, sharded=sharded))
    assert first == second
    assert first[0] == 1


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(tp=2, sp=True)], ids=str)
def test_a_micro_batch_is_balanced_over_the_ranks_that_share_its_rows(layout):
    assert_same_training("MIXTURE", layout, experts={"balancing": "aux"})


def test_each_micro_batch_is_balanced_by_itself():
    options = {"experts": {"balancing": "aux"}, "cut": "micro-batches", "micro_batch_size": 3}
    assert_same_training("MIXTURE", Layout(dp=2, ep=2), **options)


@pytest.mark.parametrize("name", ["MIXTURE", "ODD"])
def test_means_of_micro_batches_weigh_the_losses_of_routers_alike(name):
    options = {"cut": "micro-batches", "micro_batch_size": 3, "loss_reduction": "micro_batch"}
    assert_same_training(name, Layout(dp=2, ep=2), **options)


DROPPING = [
    (Layout(dp=2, ep=2), "replicas", "alltoall"),
    (Layout(dp=2, ep=2), "replicas", "allgather"),
    (Layout(tp=2, sp=True), "halves", "alltoall"),
    (Layout(tp=2, sp=True, ep=2, etp=1), "halves", "allgather"),
]


@pytest.mark.parametrize(("layout", "cut", "dispatch"), DROPPING, ids=str)
def test_tokens_beyond_the_capacity_are_dropped(layout, cut, dispatch):
    factor = 1.25 if cut == "replicas" else 1.249  # as many tokens; other first weights
    options = {"experts": {"capacity_factor": factor}, "kernels": Kernels(expert_dispatch=dispatch)}
    assert_same_training("MIXTURE", layout, cut=cut, **options)


@pytest.mark.parametrize("recompute", ["full", ["mlp"], ["mlp_act", "layernorm"]], ids=str)
def test_recomputed_experts_change_nothing(recompute):
    assert_same_training("ODD", Layout(dp=2, ep=2), recompute=recompute)


def test_shared_experts_beside_the_dispatch_change_nothing():
    config, expected = replace(config_of("ODD"), extra={"moe_shared_expert_overlap": True}), truth("ODD")
    train = functools.partial(parallel_experts.train, full=expected["weights"])
    for layout in (Layout(dp=2, ep=2), Layout(tp=2, ep=2, etp=1, sp=True)):
        ranks = run_in_pool(layout.world_size, train, config, layout, ROWS, STEPS, CLIP, timeout=240)
        assert_gpt_trained_alike(ranks, expected)


def test_overlapped_communication_changes_nothing():
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=4096)
    assert_same_training("MIXTURE", Layout(dp=4, ep=2), ddp=ddp)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, pp=2, dp=2, ep=4, etp=1, sp=True),
        Layout(tp=2, dp=4, ep=2, etp=2, sp=True),
        Layout(pp=2, dp=4, ep=4),
    ],
    ids=str,
)
def test_eight_ranks(layout):
    assert_same_training("MIXTURE", layout)
