"""Ranks that share the tokens of each row train as plain PyTorch in one process does.

Tolerances as in ``test_truth``. The loss masks leave ranks without any label in some micro-batches, and clipping is on.
"""

import functools
from typing import Any

import pytest

from tests.reference import parallel_gpt, plain_gpt
from tests.reference.same_training import (
    CLIP,
    ROWS,
    assert_bert_trains_alike,
    assert_gpt_trained_alike,
    assert_t5_trains_alike,
)
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

STEPS = 5
COMMS = ["all_gather", "all_to_all", "ring"]
GPTS = ["GPT2", "LLAMA", "WINDOWED", "PACKED", "PACKED_GPT2"]
ALONE = [Layout(cp=2), Layout(cp=4)]
FOUR_RANKS = [
    Layout(cp=2, tp=2, sp=True),
    Layout(cp=2, tp=2),
    Layout(cp=2, pp=2),
    Layout(cp=2, pp=2, vp=2),
    Layout(cp=2, dp=2),
    Layout(cp=2, dp=2, sharded=False),
]
EIGHT_RANKS = [Layout(cp=2, tp=2, pp=2, sp=True), Layout(cp=2, pp=2, vp=2, dp=2), Layout(cp=4, tp=2, sp=True)]


@functools.cache
def truth(name: str) -> dict[str, Any]:
    config = getattr(plain_gpt, name)
    samples = parallel_gpt.packed_samples if "PACKED" in name else parallel_gpt.text_samples
    return plain_gpt.train(config, samples(config, ROWS * STEPS), ROWS, STEPS, CLIP)


def assert_same_training(name: str, layout: Layout, accumulate: int = 1, **options: Any) -> None:
    expected, config = truth(name), getattr(plain_gpt, name)
    options = {"packed": "PACKED" in name, **options}
    train = functools.partial(parallel_gpt.train, full=expected["weights"], **options)
    ranks = run_in_pool(layout.world_size, train, config, layout, ROWS, STEPS, CLIP, accumulate)
    assert_gpt_trained_alike(ranks, expected, losses=accumulate == 1)


@pytest.mark.parametrize("layout", ALONE, ids=str)
@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("name", GPTS)
def test_a_gpt(name: str, comm: str, layout: Layout) -> None:
    assert_same_training(name, layout, cp_comm=comm)


@pytest.mark.parametrize("layout", FOUR_RANKS, ids=str)
@pytest.mark.parametrize("comm", COMMS)
def test_beside_other_parallelism(comm: str, layout: Layout) -> None:
    assert_same_training("PACKED", layout, cp_comm=comm)


@pytest.mark.slow
@pytest.mark.parametrize("layout", EIGHT_RANKS, ids=str)
@pytest.mark.parametrize("comm", COMMS)
def test_eight_ranks(comm: str, layout: Layout) -> None:
    assert_same_training("LLAMA", layout, cp_comm=comm)


@pytest.mark.parametrize("layout", [Layout(cp=2, dp=2), Layout(cp=2, pp=2)], ids=str)
def test_accumulation_is_one_big_batch(layout: Layout) -> None:
    assert_same_training("PACKED", layout, accumulate=3)


@pytest.mark.parametrize(
    "options", [{"recompute": "full"}, {"recompute": "selective"}, {"micro_batch_size": 1}], ids=str
)
@pytest.mark.parametrize("comm", COMMS)
def test_recomputation_and_micro_batches_change_nothing(comm: str, options: dict[str, Any]) -> None:
    assert_same_training("WINDOWED", Layout(cp=2), cp_comm=comm, **options)


BORDERS = [Layout(pp=2, vp=2), Layout(cp=2), Layout(cp=2, pp=2), Layout(tp=2, sp=True)]


@pytest.mark.parametrize("layout", BORDERS, ids=str)
@pytest.mark.parametrize("name", ["PACKED", "PACKED_GPT2"])
def test_borders_between_documents_reach_every_stage(name: str, layout: Layout) -> None:
    assert_same_training(name, layout, packed="borders", recompute="full" if layout.pp == 1 else None)


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(cp=2, tp=2, sp=True)], ids=str)
def test_a_length_that_does_not_divide_is_padded(layout: Layout) -> None:
    assert_same_training("ODD", layout)


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(cp=2, dp=2)], ids=str)
def test_mean_of_micro_batch_means(layout: Layout) -> None:
    config, size = plain_gpt.GPT2, 3
    parts = [
        slice(replica + first * layout.dp, replica + (first + size) * layout.dp, layout.dp)
        for replica in range(layout.dp)
        for first in range(0, ROWS // layout.dp, size)
    ]
    expected = plain_gpt.train(config, parallel_gpt.text_samples(config, ROWS * STEPS), ROWS, STEPS, CLIP, parts)
    assert expected["losses"] != pytest.approx(truth("GPT2")["losses"], rel=1e-5), "the two means do not differ"
    train = functools.partial(
        parallel_gpt.train, full=expected["weights"], loss_reduction="micro_batch", micro_batch_size=size
    )
    assert_gpt_trained_alike(run_in_pool(layout.world_size, train, config, layout, ROWS, STEPS, CLIP), expected)


BERTS = ["pretraining", "classes", "several_labels", "numbers", "tokens", "masked_lm"]


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(cp=2, tp=2, sp=True), Layout(cp=2, pp=2)], ids=str)
@pytest.mark.parametrize("name", BERTS)
def test_a_bert(name: str, layout: Layout) -> None:
    assert_bert_trains_alike(name, layout)


@pytest.mark.parametrize("comm", COMMS)
def test_a_bert_by_each_way(comm: str) -> None:
    assert_bert_trains_alike("pretraining", Layout(cp=2), cp_comm=comm)


@pytest.mark.parametrize(
    "layout", [Layout(cp=2), Layout(cp=4), Layout(cp=2, tp=2, sp=True), Layout(cp=2, pp=2)], ids=str
)
@pytest.mark.parametrize("name", ["t5", "learned"])
def test_a_t5(name: str, layout: Layout) -> None:
    assert_t5_trains_alike(name, layout)


@pytest.mark.parametrize("comm", COMMS)
def test_a_t5_by_each_way(comm: str) -> None:
    assert_t5_trains_alike("learned", Layout(cp=2), cp_comm=comm)
