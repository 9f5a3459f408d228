"""Each layout dimension by itself, and all together, against plain PyTorch in one process: two launches of real ranks.

``test_truth.py`` has every layout, and says more of each.
"""

import functools
from typing import Any

import pytest

from tests.reference import parallel_gpt, plain_gpt
from tests.support.layout import Layout
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.quick
ROWS, STEPS, CLIP = 12, 3, 0.5
LAYOUTS = {
    "tensor parallel": Layout(tp=2),
    "sequence parallel": Layout(tp=2, sp=True),
    "pipeline parallel": Layout(pp=2),
    "virtual stages": Layout(pp=2, vp=2),
    "distributed optimizer": Layout(dp=2),
    "replicated optimizer": Layout(dp=2, sharded=False),
    "combined": Layout(tp=2, pp=2, vp=2, sp=True),
    "combined with replicas": Layout(tp=2, dp=2, sp=True),
}
CASES = {**{name: ("GPT2", layout) for name, layout in LAYOUTS.items()}, "padded vocabulary": ("ODD", Layout(tp=2))}


@functools.cache
def truth(model: str) -> dict[str, Any]:
    config = getattr(plain_gpt, model)
    return plain_gpt.train(config, parallel_gpt.text_samples(config, ROWS * STEPS), ROWS, STEPS, CLIP)


def _train_in_turn(names: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in names:
        model, layout = CASES[name]
        config, full = getattr(plain_gpt, model), truth(model)["weights"]
        found[name] = parallel_gpt.train(config, layout, ROWS, STEPS, CLIP, full=full)
    return found


@functools.cache
def trained(world_size: int) -> list[dict[str, dict[str, Any]]]:
    """What each rank has of every case of this world size, from one launch."""
    return run_ranks(
        world_size, _train_in_turn, [n for n, (_, layout) in CASES.items() if layout.world_size == world_size]
    )


@pytest.mark.parametrize("name", CASES)
def test_trains_as_plain_pytorch(name: str) -> None:
    model, layout = CASES[name]
    expected = truth(model)
    assert max(expected["norms"]) > CLIP, "the truth never clipped, so clipping is not tested"
    for seen in trained(layout.world_size):
        assert seen[name]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen[name]["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert seen[name]["distance"] < 1e-5
