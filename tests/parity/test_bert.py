"""Every layout trains a BERT as transformers' does in one process.

Tolerances as in ``test_truth``: fp32 sums are taken in another order by each layout. Dropout is 0.
"""

import itertools

import pytest

from lightning_megatron import Kernels
from tests.reference.same_training import assert_bert_trains_alike
from tests.support.layout import Layout


def layouts() -> list[Layout]:
    found = []
    for tp, pp, dp, vp, sp in itertools.product((1, 2), (1, 2, 4), (1, 2), (None, 2), (False, True)):
        layout = Layout(tp=tp, pp=pp, dp=dp, vp=vp, sp=sp)
        if layout.world_size <= 4 and not (vp and pp == 1) and not (sp and tp == 1):
            found.append(layout)
    return found


@pytest.mark.parametrize("layout", layouts(), ids=str)
@pytest.mark.parametrize("name", ["pretraining", "classes"])
def test_matches_transformers(name, layout):
    assert_bert_trains_alike(name, layout)


FEW = [Layout(), Layout(tp=2, dp=2, sp=True), Layout(pp=2, vp=2)]


@pytest.mark.parametrize("layout", FEW, ids=str)
@pytest.mark.parametrize("name", ["pre_norm", "pre_norm_classes"])
def test_norms_before_the_blocks_as_in_megatron_bert(name, layout):
    assert_bert_trains_alike(name, layout)


@pytest.mark.parametrize("layout", [Layout(tp=2, sp=True), Layout(pp=2, dp=2)], ids=str)
@pytest.mark.parametrize("name", ["masked_lm", "several_labels", "one_number", "numbers", "tokens", "answers"])
def test_every_task(name, layout):
    assert_bert_trains_alike(name, layout)


MODERN = [
    ("modern", Layout()),
    ("modern", Layout(tp=2, dp=2, sp=True)),
    ("modern_packed", Layout(pp=2, vp=2)),
    ("modern_mean", Layout(tp=2, sp=True)),
    ("modern_tokens", Layout(tp=2, pp=2, sp=True)),
]


@pytest.mark.parametrize(("name", "layout"), MODERN, ids=str)
def test_modern_bert(name, layout):
    assert_bert_trains_alike(name, layout)


def test_modern_bert_recomputed():
    assert_bert_trains_alike("modern", Layout(tp=2, sp=True), recompute="selective", micro_batch_size=3)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_and_micro_batches_change_nothing(recompute):
    assert_bert_trains_alike("pretraining", Layout(tp=2, sp=True), recompute=recompute, micro_batch_size=3)


@pytest.mark.parametrize("layout", [Layout(tp=2, dp=2, sp=True), Layout(pp=2, vp=2)], ids=str)
def test_the_loss_in_chunks_changes_nothing(layout):
    assert_bert_trains_alike("pretraining", layout, kernels=Kernels(chunked_loss=True))


def test_label_smoothing_and_z_loss():
    assert_bert_trains_alike("masked_lm", Layout(tp=2, sp=True), {"label_smoothing": 0.1, "z_loss": 0.01})
