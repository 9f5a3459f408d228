"""What only some families have, in each way in which ranks share rows: they train as transformers does in one process.

Gemma 2 caps scores and has windows in some layers; Gemma 3's windows have rotary positions of their own. Tolerances as
in ``test_pretrained``.
"""

from typing import Any

import pytest
import torch

from tests.reference import pretrained
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

NAMES = ["gemma2", "gemma3"]


@pytest.mark.parametrize("comm", ["all_gather", "all_to_all", "ring"])
def test_training_is_transformers(comm: str, tmp_path: Any) -> None:
    layout = Layout(cp=2, extra={"cp_comm": comm})
    ranks = run_in_pool(layout.world_size, pretrained.run_on_rank, NAMES, layout, tmp_path, timeout=240)
    for name in NAMES:
        expected = pretrained.truth(name)
        for rank in ranks:
            for seen, wanted in zip(rank[name]["logits"], expected["logits"], strict=True):
                torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-5)
            assert rank[name]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        trained = pretrained.load(name, tmp_path / name / "after").state_dict()
        for key, value in expected["weights"].items():
            torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-4)


def test_sinks_train_where_ranks_share_rows(tmp_path: Any) -> None:
    """GPT-OSS: each rank has whole rows and the sinks of its heads."""
    ranks = run_in_pool(2, pretrained.run_on_rank, ["gpt_oss"], Layout(cp=2), tmp_path, timeout=240)
    expected = pretrained.truth("gpt_oss")
    for rank in ranks:
        assert rank["gpt_oss"]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    trained = pretrained.load("gpt_oss", tmp_path / "gpt_oss" / "after").state_dict()
    for key, value in expected["weights"].items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-4)
