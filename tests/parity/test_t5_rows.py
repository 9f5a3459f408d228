"""Pairs of texts that share a row of a T5 train it as each pair alone does in transformers' T5, in one process.

Tolerances as in ``test_truth``.
"""

import functools
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_megatron.models.layers import attention, attention_pieces, recomputed_blocks
from tests.reference import plain_t5
from tests.reference.from_truth import predict_and_train
from tests.reference.parallel_t5 import LoadedT5
from tests.reference.plain_gpt import ADAM
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

ROWS, STEPS = 4, 3
LENGTH, TARGETS = plain_t5.LENGTHS[0], plain_t5.TARGET_LENGTHS[0]
# Tokens of each pair: of the encoder, of the decoder. No sum fills a row of each side but the last one's.
PAIRS = [[(9, 7), (17, 3), (4, 8)], [(3, 9), (21, 5)], [(30, 20)], [(5, 6), (12, 12), (20, 5)]]


@functools.cache
def samples(name: str) -> list[dict[str, torch.Tensor]]:
    generator, vocabulary = torch.Generator().manual_seed(5), plain_t5.CONFIGS[name].vocab_size
    found = []
    for number in range(ROWS * STEPS):
        pairs = PAIRS[number % len(PAIRS)]
        ids, labels = (torch.randint(1, vocabulary, (size,), generator=generator) for size in (LENGTH, TARGETS))
        (of_ids, used), (of_labels, counted) = (numbers([pair[side] for pair in pairs], size) for side, size in SIDES)
        labels = labels.where(counted, -100)
        labels[2] = -100  # one in the midst of a text
        found.append(
            {
                "input_ids": ids.where(used, 0),
                "attention_mask": used.long(),
                "labels": labels,
                "seq_idx": of_ids,
                "decoder_seq_idx": of_labels,
            }
        )
    return found


SIDES = ((0, LENGTH), (1, TARGETS))


def numbers(sizes: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each token's text, from 1, and whether it is no padding, which has another number."""
    found = torch.repeat_interleave(torch.arange(1, len(sizes) + 1), torch.tensor(sizes))
    padded = F.pad(found, (0, length - len(found)), value=len(sizes) + 1)
    return padded, padded <= len(sizes)


def pairs_of(row: dict[str, torch.Tensor]) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Each pair alone, and which of the decoder's places it has."""
    found = []
    for number in range(1, int(row["seq_idx"][row["attention_mask"] > 0].max()) + 1):
        places = row["decoder_seq_idx"] == number
        pair = {"input_ids": row["input_ids"][row["seq_idx"] == number], "labels": row["labels"][places]}
        found.append(({key: value[None] for key, value in pair.items()}, places))
    return found


@functools.cache
def truth(name: str) -> dict[str, Any]:
    """As ``plain_t5.train``; the logits are those of the first batch, 0 at padding."""
    model, rows = plain_t5.new_model(name), samples(name)
    logits = torch.zeros(ROWS, TARGETS, plain_t5.CONFIGS[name].vocab_size)
    for row, of_row in zip(rows[:ROWS], logits, strict=True):
        for pair, places in pairs_of(row):
            with torch.no_grad():
                of_row[places] = model(**pair).logits[0]
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses, norms = [], []
    for step in range(STEPS):
        total, count = torch.zeros(()), 0
        for row in rows[step * ROWS : (step + 1) * ROWS]:
            for pair, _ in pairs_of(row):
                labelled = int((pair["labels"] != -100).sum())
                total, count = total + model(**pair).loss * labelled, count + labelled
        optimizer.zero_grad()
        (total / count).backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
        losses.append(float(total.detach() / count))
    return {"losses": losses, "norms": norms, "logits": logits, "weights": plain_t5.megatron_weights(model)}


@contextmanager
def short_blocks(asked: bool):
    """As if these rows were long: attention is computed in pieces, and scores with a bias in blocks."""
    sizes = [(attention, "AT_ONCE", 8), (recomputed_blocks, "_BLOCK", 5), (attention, "JOINED", 8)]
    sizes = [*sizes, (attention_pieces, "JOINED", 8)] if asked else []
    before = [(module, name, getattr(module, name)) for module, name, _ in sizes]
    for each in sizes:
        setattr(*each)
    try:
        yield
    finally:
        for each in before:
            setattr(*each)


def train(name: str, layout: Layout, full: Any, blocks: bool, **strategy: Any) -> dict[str, Any]:
    with short_blocks(blocks):
        return predict_and_train(LoadedT5(name), samples(name), layout, ROWS, STEPS, full, **strategy)


def assert_rows_train_alike(name: str, layout: Layout, *, blocks: bool = False, **strategy: Any) -> None:
    expected = truth(name)
    real = torch.stack([row["decoder_seq_idx"] <= len(pairs_of(row)) for row in samples(name)[:ROWS]])
    function = functools.partial(train, blocks=blocks, **strategy)
    for seen in run_in_pool(layout.world_size, function, name, layout, expected["weights"]):
        torch.testing.assert_close(seen["logits"][0][real], expected["logits"][real], rtol=0, atol=1e-5)
        assert [step["train_loss"] for step in seen["steps"]] == pytest.approx(expected["losses"], rel=1e-5)
        assert [step["grad_norm"] for step in seen["steps"]] == pytest.approx(expected["norms"], rel=1e-4)
        assert seen["distance"] < 1e-5


# pp=4, split=2: a stage of each stack that is neither the first nor the last, too.
LAYOUTS = [Layout(), Layout(tp=2, sp=True), Layout(pp=4, split=2), Layout(pp=2, vp=2, split=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["t5", "learned"])
def test_pairs_in_a_row(name: str, layout: Layout) -> None:
    assert_rows_train_alike(name, layout)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_blocks(recompute: str) -> None:
    assert_rows_train_alike("t5", Layout(tp=2, sp=True), blocks=True, recompute=recompute, micro_batch_size=2)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    ("name", "comm"), [("t5", "all_gather"), ("t5", "all_to_all"), ("learned", "all_gather"), ("learned", "ring")]
)
def test_rows_that_ranks_share(name: str, comm: str, blocks: bool) -> None:
    # One row at a time: the union of several rows' borders would hide what is cut off from one of them.
    assert_rows_train_alike(name, Layout(cp=2), blocks=blocks, cp_comm=comm, micro_batch_size=1)


def test_shared_by_stages_and_ranks() -> None:
    assert_rows_train_alike("t5", Layout(cp=2, pp=2), blocks=True)
