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
@pytest.mark.parametrize(
    ("name", "layout", "comm"),
    [
        ("PACKED", EIGHT_RANKS[0], "all_to_all"),
        ("LLAMA", EIGHT_RANKS[0], "ring"),
        ("PACKED", EIGHT_RANKS[1], "all_gather"),
        ("WINDOWED", EIGHT_RANKS[1], "all_to_all"),
        ("WINDOWED", EIGHT_RANKS[2], "all_gather"),
        ("PACKED", EIGHT_RANKS[2], "ring"),
    ],
    ids=str,
)
def test_eight_ranks(name: str, layout: Layout, comm: str) -> None:
    assert_same_training(name, layout, cp_comm=comm)


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


@pytest.mark.parametrize("comm", COMMS)
def test_low_precision_is_near_that_of_one_rank(comm: str) -> None:
    """The band: both round each layer to 16 bits, and sum in another order."""
    options = {"precision": "bf16-mixed", "packed": True}
    (plain,) = _bf16(Layout(), **options)
    for seen in _bf16(Layout(cp=2), cp_comm=comm, **options):
        assert seen["losses"] == pytest.approx(plain["losses"], rel=2e-3)
        assert seen["norms"] == pytest.approx(plain["norms"], rel=3e-2)


def _bf16(layout: Layout, **options: Any) -> list[dict[str, Any]]:
    train = functools.partial(parallel_gpt.train, **options)
    return run_in_pool(layout.world_size, train, plain_gpt.PACKED, layout, ROWS, STEPS, CLIP)


# A BERT's losses are of single tokens of a row, of its first one, or of one among all of them; "packed" ones have rows
# of three texts.
BERTS = [
    ("classes", Layout(cp=2)),
    ("numbers", Layout(cp=2)),
    ("packed", Layout(cp=2)),
    ("pretraining", Layout(cp=2, tp=2, sp=True)),
    ("packed_tokens", Layout(cp=2, tp=2, sp=True)),
    ("several_labels", Layout(cp=2, pp=2)),
    ("packed", Layout(cp=2, pp=2, vp=2)),
    ("tokens", Layout(cp=4)),
    ("answers", Layout(cp=4)),
    ("answers", Layout(cp=2, tp=2, sp=True)),
    ("pretraining", Layout(cp=4)),
    ("modern_mean", Layout(cp=2, tp=2, sp=True)),
    ("modern_packed", Layout(cp=2, pp=2, vp=2)),
    pytest.param("packed", EIGHT_RANKS[0], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "layout"), BERTS, ids=str)
def test_a_bert(name: str, layout: Layout) -> None:
    assert_bert_trains_alike(name, layout)


@pytest.mark.parametrize(
    ("comm", "layout"),
    [
        ("all_gather", Layout(cp=2)),
        ("ring", Layout(cp=2)),
        ("ring", Layout(cp=4)),
        ("all_to_all", Layout(cp=3)),
    ],
    ids=str,
)
def test_a_bert_by_each_way(comm: str, layout: Layout) -> None:
    assert_bert_trains_alike("packed_tokens", layout, cp_comm=comm)


@pytest.mark.parametrize(
    ("name", "comm", "layout"),
    [
        ("modern", "all_gather", Layout(cp=2)),
        ("modern_packed", "ring", Layout(cp=4)),
        ("modern_mean", "ring", Layout(cp=2)),
        ("modern", "all_to_all", Layout(cp=3)),
    ],
    ids=str,
)
def test_a_modern_bert_by_each_way(name: str, comm: str, layout: Layout) -> None:
    """Its windows reach into the parts of rows of the ranks before and behind."""
    assert_bert_trains_alike(name, layout, cp_comm=comm)


def test_a_part_of_a_batch_without_a_label() -> None:
    """Micro-batches are of one row, and the second half of some is padding alone."""
    assert_bert_trains_alike("tokens", Layout(cp=2), micro_batch_size=1)


T5S = [
    ("t5", Layout(cp=2), "all_gather"),
    ("learned", Layout(cp=2), "ring"),
    ("t5", Layout(cp=3), "all_to_all"),
    ("t5", Layout(cp=4), "all_gather"),
    ("learned", Layout(cp=4), "ring"),
    ("t5", Layout(cp=2, tp=2, sp=True), None),
    ("t5", Layout(cp=2, pp=2), "all_to_all"),
    pytest.param("t5", EIGHT_RANKS[0], "all_gather", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "layout", "comm"), T5S, ids=str)
def test_a_t5(name: str, layout: Layout, comm: Any) -> None:
    assert_t5_trains_alike(name, layout, cp_comm=comm)


def test_accumulation_of_a_t5() -> None:
    assert_t5_trains_alike("t5", Layout(cp=2), accumulate=3)
