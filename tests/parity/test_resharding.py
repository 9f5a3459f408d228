"""A checkpoint of any layout loads into any other: the run goes on as plain PyTorch's uninterrupted run does.

Tolerances as in ``test_truth.py``. The truth's weights are compared at the end, so moments, main weights, step counts
and the place in the data must all have come over.
"""

import functools
from pathlib import Path

import pytest

from tests.reference import parallel_gpt, plain_gpt
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.train_part import CLIP, ROWS, STEPS, train_part

STOP = 3

ONE = Layout()
TP2 = Layout(tp=2)
TP4 = Layout(tp=4, sp=True)
PP2 = Layout(pp=2)
PP4 = Layout(pp=4)
VP2 = Layout(pp=2, vp=2)
VP4 = Layout(pp=2, vp=4)
DP2 = Layout(dp=2)
DP4 = Layout(dp=4)
DP2R = Layout(dp=2, sharded=False)
TP2PP2 = Layout(tp=2, pp=2)
TP2DP2 = Layout(tp=2, dp=2, sp=True)
TP2DP2R = Layout(tp=2, dp=2, sharded=False)
PP2DP2 = Layout(pp=2, dp=2)
VP2DP2 = Layout(pp=2, vp=2, dp=2)
ONER = Layout(sharded=False)
CP2 = Layout(cp=2)
CP4 = Layout(cp=4)
CP2DP2 = Layout(cp=2, dp=2)

PAIRS = [
    (ONE, TP2), (ONE, PP2), (ONE, VP2), (ONE, DP2), (ONE, TP2DP2), (ONE, ONER),
    (TP2, ONE), (TP2, PP2), (TP2, DP2R), (TP2, TP4), (TP2, VP2DP2),
    (TP4, TP2), (TP4, PP4), (TP4, DP4),
    (PP2, ONE), (PP2, PP4), (PP2, VP2), (PP2, TP2PP2), (PP2, DP2),
    (VP2, PP2), (VP2, VP4), (VP2, TP2), (VP2, PP2DP2),
    (DP2, ONE), (DP2, DP4), (DP2, DP2R), (DP2, TP2DP2), (DP2, PP2DP2),
    (DP2R, DP2), (DP2R, TP2PP2), (DP2R, ONE),
    (TP2PP2, VP2DP2), (TP2PP2, TP2DP2), (TP2PP2, ONE),
    (TP2DP2, TP2PP2), (TP2DP2, TP2DP2R), (TP2DP2, VP4),
    (VP2DP2, TP4), (VP2DP2, TP2DP2R), (VP2DP2, ONE),
    (CP2, ONE), (CP2, CP4), (CP4, CP2DP2), (CP2DP2, TP2), (DP2, CP2),
]  # fmt: skip


@functools.cache
def truth(name: str) -> dict:
    config = getattr(plain_gpt, name)
    return plain_gpt.train(config, parallel_gpt.text_samples(config, ROWS * STEPS), ROWS, STEPS, CLIP)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of a layout at step 3, written once."""
    folder = tmp_path_factory.mktemp("saved")

    def get(name: str, layout: Layout, precision: str = "32-true") -> Path:
        path = folder / f"{name}-{layout}-{precision}.ckpt"
        if not path.exists():
            run = functools.partial(train_part, save=path, precision=precision)
            run_in_pool(layout.world_size, run, getattr(plain_gpt, name), layout, STOP)
        return path

    return get


def assert_goes_on(name: str, path: Path, layout: Layout) -> None:
    expected = truth(name)
    run = functools.partial(train_part, load=path, full=expected["weights"])
    for seen in run_in_pool(layout.world_size, run, getattr(plain_gpt, name), layout, STEPS):
        assert len(seen["losses"]) == STEPS - STOP
        assert seen["losses"] == pytest.approx(expected["losses"][STOP:], rel=1e-5)
        assert seen["norms"] == pytest.approx(expected["norms"][STOP:], rel=1e-4)
        assert seen["distance"] < 1e-5


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda layout: str(layout))
def test_goes_on_in_another_layout(saved, before, after):
    assert_goes_on("GPT2", saved("GPT2", before), after)


@pytest.mark.parametrize("after", [Layout(tp=3, sp=True), PP2, ONE], ids=str)
@pytest.mark.parametrize("name", ["ODD", "ODD_UNTIED"])
def test_padding_of_the_vocabulary_is_stripped_and_put_back(saved, name, after):
    assert_goes_on(name, saved(name, TP2DP2), after)


@pytest.mark.parametrize(
    ("before", "after"), [(TP2DP2, PP2), (TP2PP2, DP2), (VP2, Layout(tp=4, sp=True)), (ONE, TP2)], ids=str
)
def test_gated_layers_and_grouped_queries(saved, before, after):
    assert_goes_on("LLAMA", saved("LLAMA", before), after)


@pytest.mark.parametrize(("before", "after"), [(TP2PP2, ONE), (ONE, TP2)], ids=str)
def test_latents(saved, before, after):
    assert_goes_on("LATENT", saved("LATENT", before), after)
