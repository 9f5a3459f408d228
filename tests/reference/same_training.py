"""Trains a model under a layout, and compares it with the truth; the tests say why the tolerances are what they are."""

import functools
from typing import Any

import pytest
import torch

from tests.reference import parallel_bert, parallel_t5, plain_bert, plain_t5
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

ROWS, STEPS, CLIP = 12, 6, 0.5


def assert_gpt_trained_alike(ranks: list[dict], expected: dict, losses: bool = True) -> None:
    """What ``parallel_gpt.train`` gave on each rank is the truth, which was clipped."""
    assert max(expected["norms"]) > CLIP, "the truth never clipped, so clipping is not tested"
    for seen in ranks:
        assert seen["steps"] == len(expected["norms"])
        assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert seen["distance"] < 1e-5
        if losses:
            assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def assert_bert_trains_alike(name: str, layout: Layout, terms: dict | None = None, **strategy) -> None:
    """Train one of ``plain_bert``'s models, and compare predictions, losses and weights."""
    expected = plain_bert.train(name, ROWS, STEPS, **(terms or {}))
    assert max(expected["losses"]) > 1.01 * min(expected["losses"]), "the truth does not train"
    ranks = run_in_pool(
        layout.world_size, functools.partial(parallel_bert.train, terms=terms, **strategy), name, layout, ROWS, STEPS,
        expected["weights"],
    )  # fmt: skip
    kept = plain_bert.batches(name, ROWS, 1)[0]["attention_mask"] > 0
    for seen in ranks:
        for ours, theirs in zip(seen["logits"], expected["logits"], strict=True):
            if name.startswith("modern") and ours.dim() == 3:  # padding may be further from the text than it looks
                ours, theirs = ours[kept], theirs[kept]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert [step["train_loss"] for step in seen["steps"]] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen["distance"] < 1e-4
        for step in seen["steps"] if name in ("pretraining", "pre_norm") else ():
            assert step["train_loss"] == pytest.approx(step["train_mlm_loss"] + step["train_sop_loss"], rel=1e-5)


def assert_t5_trains_alike(
    name: str, layout: Layout, total: int | None = None, terms: dict | None = None, **options: Any
) -> None:
    """Train one of ``plain_t5``'s models, and compare predictions, losses, gradient norms and weights."""
    expected = plain_t5.train(name, ROWS, STEPS, total, **(terms or {}))
    assert expected["moved"] > 3e-3, "the truth does not train"
    train = functools.partial(parallel_t5.train, total=total, terms=terms, **options)
    for seen in run_in_pool(layout.world_size, train, name, layout, ROWS, len(expected["losses"]), expected["weights"]):
        torch.testing.assert_close(seen["logits"][0], expected["logits"], rtol=0, atol=1e-5)
        steps = seen["steps"][options.get("accumulate", 1) - 1 :: options.get("accumulate", 1)]
        if "accumulate" not in options:
            assert [step["train_loss"] for step in steps] == pytest.approx(expected["losses"], rel=1e-5)
        # The norm counts weights of which several stages have a copy once.
        assert [step["grad_norm"] for step in steps] == pytest.approx(expected["norms"], rel=1e-4)
        assert seen["distance"] < 1e-4
