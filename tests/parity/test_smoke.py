"""Each layout dimension by itself, and all together, against plain PyTorch in one process.

``test_truth.py`` has every layout, and says more of each.
"""

import functools
from typing import Any

import pytest

from tests.reference import parallel_gpt, plain_gpt
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

pytestmark = pytest.mark.quick
ROWS, STEPS, CLIP = 12, 3, 0.5
CASES = {
    "tensor parallel": ("GPT2", Layout(tp=2)),
    "sequence parallel": ("GPT2", Layout(tp=2, sp=True)),
    "pipeline parallel": ("GPT2", Layout(pp=2)),
    "virtual stages": ("GPT2", Layout(pp=2, vp=2)),
    "distributed optimizer": ("GPT2", Layout(dp=2)),
    "replicated optimizer": ("GPT2", Layout(dp=2, sharded=False)),
    "combined": ("GPT2", Layout(tp=2, pp=2, vp=2, sp=True)),
    "combined with replicas": ("GPT2", Layout(tp=2, dp=2, sp=True)),
    "padded vocabulary": ("ODD", Layout(tp=2)),
}


@functools.cache
def truth(model: str) -> dict[str, Any]:
    config = getattr(plain_gpt, model)
    return plain_gpt.train(config, parallel_gpt.text_samples(config, ROWS * STEPS), ROWS, STEPS, CLIP)


@pytest.mark.parametrize("name", CASES)
def test_trains_as_plain_pytorch(name: str) -> None:
    model, layout = CASES[name]
    expected = truth(model)
    assert max(expected["norms"]) > CLIP, "the truth never clipped, so clipping is not tested"
    train = functools.partial(parallel_gpt.train, full=expected["weights"])
    for seen in run_in_pool(layout.world_size, train, getattr(plain_gpt, model), layout, ROWS, STEPS, CLIP):
        assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert seen["distance"] < 1e-5


def test_fp16_gradients_have_the_scale_of_plain_pytorchs() -> None:
    """Losses hardly show a wrong scale, since Adam divides it out. The band: fp16 keeps 11 bits of mantissa."""
    expected = truth("GPT2")
    train = functools.partial(parallel_gpt.train, precision="16-mixed", loss_scale=256.0)
    for seen in run_in_pool(2, train, plain_gpt.GPT2, Layout(tp=2), ROWS, STEPS, CLIP):
        assert seen["norms"] == pytest.approx(expected["norms"], rel=0.02)
