"""Every layout trains as plain PyTorch in one process does.

Tolerances: fp32 sums are taken in another order by each layout (splits of matrix products, reductions over ranks);
after six steps of a contracting optimizer that is some 1e-7 relative in the losses and 1e-6 in the weights. Dropout is
0 where two layouts are compared: they draw different masks.
"""

import functools
import itertools

import pytest
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_megatron import Kernels
from tests.reference import parallel_gpt, plain_gpt
from tests.reference.same_training import CLIP, ROWS, STEPS, assert_gpt_trained_alike
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool


def layouts(world_sizes: range) -> list[Layout]:
    found = []
    for tp, pp, dp, vp, sp, sharded in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (None, 2), (0, 1), (1, 0)):
        layout = Layout(tp=tp, pp=pp, dp=dp, vp=vp, sp=bool(sp), sharded=bool(sharded))
        if layout.world_size in world_sizes and not (vp and pp == 1) and not (sp and tp == 1):
            found.append(layout)
    return found


@functools.cache
def truth(name: str) -> dict:
    config = getattr(plain_gpt, name)
    return plain_gpt.train(config, parallel_gpt.text_samples(config, ROWS * STEPS), ROWS, STEPS, CLIP)


def assert_same_training(name: str, layout: Layout, accumulate: int = 1, **options) -> None:
    expected, config = truth(name), getattr(plain_gpt, name)
    ranks = run_in_pool(
        layout.world_size, functools.partial(parallel_gpt.train, **options),
        config, layout, ROWS, STEPS, CLIP, accumulate, "32-true", expected["weights"],
    )  # fmt: skip
    assert_gpt_trained_alike(ranks, expected, losses=accumulate == 1)


@pytest.mark.parametrize("layout", layouts(range(1, 5)), ids=str)
def test_matches_plain_pytorch(layout):
    assert_same_training("GPT2", layout)


LLAMA_LAYOUTS = [Layout(), Layout(tp=2, pp=2, sp=True), Layout(pp=2, vp=2, dp=2), Layout(tp=4, sp=True)]


@pytest.mark.parametrize("layout", LLAMA_LAYOUTS, ids=str)
def test_rotary_grouped_gated_untied(layout):
    assert_same_training("LLAMA", layout)


ODD_LAYOUTS = [Layout(), Layout(tp=2, dp=2, sp=True), Layout(tp=2, pp=2), Layout(tp=3, sp=True)]


@pytest.mark.parametrize("layout", ODD_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["ODD", "ODD_UNTIED"])
def test_a_padded_vocabulary_changes_nothing(name, layout):
    assert_same_training(name, layout)


ACCUMULATING = [Layout(), Layout(tp=2, dp=2, sp=True), Layout(pp=2, dp=2), Layout(pp=2, vp=2, sharded=False)]


@pytest.mark.parametrize("layout", ACCUMULATING, ids=str)
def test_accumulation_is_one_big_batch(layout):
    assert_same_training("GPT2", layout, accumulate=3)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True), Layout(pp=2), Layout(pp=2, vp=2)], ids=str)
def test_the_short_last_batch_is_trained_on(layout):
    config, rows, total = plain_gpt.GPT2, 8, 19  # two batches of 8 and one of 3, which no pipeline size divides
    expected = plain_gpt.train(config, parallel_gpt.text_samples(config, total), rows, 3, CLIP)
    train = functools.partial(parallel_gpt.train, full=expected["weights"], total_rows=total, num_microbatches=4)
    assert_gpt_trained_alike(run_in_pool(layout.world_size, train, config, layout, rows, 3, CLIP), expected)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, dp=2), Layout(pp=2, vp=2)], ids=str)
def test_mean_of_micro_batch_means(layout):
    config, size = plain_gpt.GPT2, 3
    each = ROWS // layout.dp  # replica r has the rows r, r + dp, ...
    parts = [
        slice(r + i * layout.dp, r + (i + size) * layout.dp, layout.dp)
        for r in range(layout.dp)
        for i in range(0, each, size)
    ]
    expected = plain_gpt.train(config, parallel_gpt.text_samples(config, ROWS * STEPS), ROWS, STEPS, CLIP, parts)
    assert expected["losses"] != pytest.approx(truth("GPT2")["losses"], rel=1e-5), "the two means do not differ"
    train = functools.partial(
        parallel_gpt.train, full=expected["weights"], loss_reduction="micro_batch", micro_batch_size=size
    )
    assert_gpt_trained_alike(run_in_pool(layout.world_size, train, config, layout, ROWS, STEPS, CLIP), expected)


def test_micro_batch_size_and_recompute_change_nothing():
    assert_same_training("GPT2", Layout(tp=2), micro_batch_size=4, recompute="full")
    assert_same_training("GPT2", Layout(pp=2), micro_batch_size=3, recompute="selective")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2, pp=2, dp=2, sp=True), Layout(tp=2, pp=4, vp=2), Layout(tp=2, pp=2, dp=2, vp=2, sp=True)],
    ids=str,
)
def test_eight_ranks(layout):
    assert_same_training("GPT2", layout)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("gather", [False, True], ids=["reduce", "reduce-and-gather"])
def test_overlapped_communication_changes_nothing(gather, accumulate):
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=gather, bucket_size=4096)
    assert_same_training("GPT2", Layout(dp=2), accumulate, ddp=ddp)


CHUNKED = [
    ("GPT2", Layout(), {}),
    ("GPT2", Layout(tp=2, dp=2, sp=True), {"accumulate": 3}),
    ("GPT2", Layout(tp=2, pp=2), {"recompute": "full", "micro_batch_size": 3}),
    ("ODD", Layout(pp=2, vp=2), {"micro_batch_size": 2}),
    ("ODD_UNTIED", Layout(tp=3, sp=True), {}),
    ("ODD_UNTIED", Layout(dp=2), {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
]


@pytest.mark.parametrize(("name", "layout", "options"), CHUNKED, ids=lambda each: str(each) if each else "")
def test_the_loss_in_chunks_changes_nothing(name, layout, options):
    if "ddp" in options:
        options = {"ddp": DistributedDataParallelConfig(**options["ddp"], bucket_size=4096)}
    assert_same_training(name, layout, kernels=Kernels(chunked_loss=True), **options)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_loss_in_chunks_of_low_precision_is_near_that_of_the_logits(precision):
    """The band: both round the gradient of the logits to 16 bits, and sum its products in another order."""
    layout = Layout(tp=2)
    chunked, plain = [
        run_in_pool(
            layout.world_size,
            functools.partial(parallel_gpt.train, precision=precision, kernels=Kernels(chunked_loss=flag)),
            plain_gpt.ODD, layout, ROWS, STEPS, CLIP,
        )[0]
        for flag in (True, False)
    ]  # fmt: skip
    assert chunked["losses"] == pytest.approx(plain["losses"], rel=2e-3)
    assert chunked["norms"] == pytest.approx(plain["norms"], rel=2e-2)


TERMS = {"label_smoothing": 0.1, "z_loss": 0.01}


@functools.cache
def truth_with_terms(name: str) -> dict:
    config = getattr(plain_gpt, name)
    return plain_gpt.train(config, parallel_gpt.text_samples(config, ROWS * STEPS), ROWS, STEPS, CLIP, **TERMS)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("GPT2", Layout()), ("ODD_UNTIED", Layout(tp=2, sp=True)), ("ODD", Layout(pp=2))],
    ids=str,
)
def test_label_smoothing_and_z_loss(name, layout):
    expected, config = truth_with_terms(name), getattr(plain_gpt, name)
    assert expected["losses"] != pytest.approx(truth(name)["losses"], rel=1e-2), "the terms change nothing"
    train = functools.partial(parallel_gpt.train, full=expected["weights"], terms=TERMS)
    assert_gpt_trained_alike(run_in_pool(layout.world_size, train, config, layout, ROWS, STEPS, CLIP), expected)
