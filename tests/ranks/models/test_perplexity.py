"""Perplexity is that of all tokens of the set, under every layout, whatever the batches."""

import math

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_megatron import AutoModule
from lightning_megatron.callbacks import Perplexity
from tests.reference import pretrained
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import trainer

LENGTHS = (5, 9, 20, 33, 12)


def rows():
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(1, 211, (length,), generator=generator)} for length in LENGTHS]


def expected():
    losses = [
        pretrained.new_model("llama")(row["input_ids"][None], labels=row["input_ids"][None]).loss for row in rows()
    ]
    tokens = [length - 1 for length in LENGTHS]
    return math.exp(sum(float(loss.detach()) * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens))


def _evaluate(layout):
    module = AutoModule.from_pretrained(pretrained.new_model("llama"))
    run = trainer(layout, callbacks=[Perplexity()], max_epochs=1, num_sanity_val_steps=1)
    loader = DataLoader(rows(), batch_size=1)
    (validated,) = run.validate(module, loader)
    (tested,) = run.test(module, loader)
    run.fit(module, loader, loader)
    return validated["val_perplexity"], tested["test_perplexity"], float(run.callback_metrics["val_perplexity"])


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(cp=2)], ids=str)
def test_of_all_tokens(layout):
    for validated, tested, after_a_step in run_in_pool(2, _evaluate, layout):
        assert validated == pytest.approx(expected(), rel=1e-5)
        assert tested == validated
        assert after_a_step > 0
        assert after_a_step != validated


def _ask_for_another():
    run = trainer(Layout(), callbacks=[Perplexity("mlm_loss")])
    run.validate(AutoModule.from_pretrained(pretrained.new_model("llama")), DataLoader(rows(), batch_size=1))


def test_a_loss_that_is_not_logged_is_named():
    with pytest.raises(RankError, match=rf"{MisconfigurationException.__name__}.*needs 'val_mlm_loss'.*val_loss"):
        run_ranks(1, _ask_for_another)
