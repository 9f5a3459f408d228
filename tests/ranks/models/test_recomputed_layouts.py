"""Recomputed activations change nothing on several ranks, to the bit, with dropout."""

import pytest

from tests.reference import parallel_gpt, plain_gpt
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

DROPOUT = plain_gpt.replace(plain_gpt.LLAMA, hidden_dropout=0.1, attention_dropout=0.1)
KINDS = (None, "selective", ["mlp", "layernorm"], 1)


def _trainings(layout: Layout) -> list[dict]:
    return [parallel_gpt.train(DROPOUT, layout, 8, 2, num_microbatches=4, recompute=kind) for kind in KINDS]


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2, vp=2, sp=True), Layout(tp=2)], ids=str)
def test_nothing_changes(layout):
    for plain, *recomputed in run_in_pool(layout.world_size, _trainings, layout, timeout=300):
        assert all(seen["losses"] == plain["losses"] for seen in recomputed)
        assert all(seen["norms"] == plain["norms"] for seen in recomputed)
