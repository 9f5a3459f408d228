"""GPTs with heads for labels train as transformers' do in one process, wherever the last token of a row is.

Rows are padded behind, in front, or not at all. Tolerances as in ``test_truth``, of weights as in ``test_pretrained``.
"""

from typing import Any

import pytest
import torch

from tests.reference import headed_gpts
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

EVERY = list(headed_gpts.MODELS)
LAYOUTS = {
    Layout(cp=2): EVERY,
    Layout(tp=2, sp=True): ["classes", "tokens"],
    Layout(pp=2, vp=2): ["number", "tokens"],
    Layout(dp=2): ["tokens", "answers"],
    Layout(dp=2, ep=2): ["several"],
    Layout(tp=2, cp=2, sp=True): ["classes", "number", "answers"],
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_is_transformers(layout: Layout, tmp_path: Any) -> None:
    names = LAYOUTS[layout]
    ranks = run_in_pool(layout.world_size, headed_gpts.run_on_rank, names, layout, tmp_path, timeout=240)
    for name in names:
        expected = headed_gpts.truth(name)
        assert expected["losses"][0] != pytest.approx(expected["losses"][-1], rel=1e-2), "the truth does not train"
        for rank in ranks:
            seen = rank[name]
            logits = headed_gpts.counted(name, seen["logits"])
            torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
            assert seen["tested"] == pytest.approx(expected["losses"][0], rel=1e-5)
            assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        trained = type(headed_gpts.new_model(name)).from_pretrained(tmp_path / name).state_dict()
        for key, value in expected["weights"].items():
            torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-4)
