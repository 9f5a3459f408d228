"""Mixtures evaluate and predict as one process does, where replicas that hold experts together read unequally much."""

import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_megatron.callbacks import Perplexity
from tests.reference import plain_experts
from tests.reference.parallel_experts import LoadedMixture
from tests.reference.plain_experts import ODD
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import trainer

LENGTHS = (5, 16, 7, 12, 9, 3, 14)


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(1, 61, (length,), generator=generator)} for length in LENGTHS]


def evaluate(layout: Layout) -> dict[str, Any]:
    """Seven texts of unequal lengths, each a batch, so that replicas have unequally many batches and tokens."""
    run = trainer(layout, callbacks=[Perplexity()], max_epochs=1, num_sanity_val_steps=1)
    module, loader = LoadedMixture(ODD), DataLoader(rows(), batch_size=1)
    (validated,) = run.validate(module, loader)
    (tested,) = run.test(module, loader)
    predicted = run.predict(module, loader)
    watched = trainer(layout, callbacks=[Perplexity()], max_epochs=1, num_sanity_val_steps=1)
    even = DataLoader([row for row in rows() if len(row["input_ids"]) == 16] * 4, batch_size=4 // layout.dp)
    watched.fit(LoadedMixture(ODD), even, loader)
    return {
        "values": [validated["val_loss"], validated["val_perplexity"], tested["test_perplexity"]],
        "after": float(watched.callback_metrics["val_perplexity"]),
        "predicted": predicted,
    }


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, ep=2), Layout(dp=2, etp=2), Layout(dp=4, ep=2, etp=2), Layout(pp=2, dp=2, ep=2)],
    ids=str,
)
def test_unequal_numbers_of_batches_and_tokens(layout):
    (expected,) = run_in_pool(1, evaluate, Layout(), timeout=600)
    for rank, seen in enumerate(run_in_pool(layout.world_size, evaluate, layout, timeout=600)):
        assert seen["values"] == pytest.approx(expected["values"], rel=1e-5)
        assert seen["after"] == pytest.approx(expected["after"], rel=1e-4)
        own = expected["predicted"][rank % layout.dp :: layout.dp]  # of other lengths: they stay where they were made
        for one, other in zip(seen["predicted"], own, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


class OfODD(LoadedMixture):
    """Starts from the same weights whatever the capacity is."""

    def initial_weights(self) -> Any:
        return plain_experts.initial_weights(ODD)


def drops(factor: float | None, eval_factor: float | None) -> float:
    experts = plain_experts.experts_of(ODD)
    config = plain_experts.replace(
        ODD, experts=plain_experts.replace(experts, capacity_factor=factor, eval_capacity_factor=eval_factor)
    )
    (found,) = trainer(Layout()).validate(OfODD(config), DataLoader(rows(), batch_size=1))
    return float(found["val_loss"])


def test_no_token_is_dropped_in_evaluation_unless_asked():
    whole, dropped, asked = (run_in_pool(1, drops, *factors)[0] for factors in ((None, None), (0.5, None), (None, 0.5)))
    assert dropped == whole
    assert asked != pytest.approx(whole, rel=1e-4)


class Failing(LoadedMixture):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_rank == 1 and batch_idx == 2:
            raise KeyError("mine")
        return super().validation_step(batch, batch_idx)


def fail() -> None:
    trainer(Layout(dp=2, ep=2)).validate(Failing(ODD), DataLoader(rows(), batch_size=1))


def test_an_error_on_one_rank_ends_the_others():
    start = time.monotonic()
    with pytest.raises(RankError, match="KeyError: 'mine'"):
        run_ranks(2, fail, timeout=200)
    assert time.monotonic() - start < 200
