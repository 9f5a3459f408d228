"""Models of transformers come in, are trained and go out under every layout, as transformers does it in one process.

Logits agree to 1e-5 and weights after 10 steps to 1e-4 in fp32: sums are taken in another order. What is not trained
is the same byte by byte.
"""

import functools

import pytest
import torch
import transformers

from tests.reference import pretrained
from tests.support.layout import Layout
from tests.support.ranks import run_ranks

LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2, sp=True)]
EXPERT_LAYOUTS = [Layout(), Layout(dp=2, ep=2), Layout(tp=2, sp=True), Layout(tp=2, sp=True, ep=2, etp=1)]
STAGES = Layout(pp=2, dp=2, ep=2)  # for whom an even number of layers can be cut in two
CASES = [(name, layout) for layout in LAYOUTS for name in pretrained.DENSE]
CASES = [(name, layout) for name, layout in CASES if name not in pretrained.FURTHER or layout == LAYOUTS[-1]]
CASES += [(name, layout) for layout in EXPERT_LAYOUTS for name in pretrained.MIXTURES] + [("qwen3_moe", STAGES)]
CASES.remove(("gpt_oss", EXPERT_LAYOUTS[2]))  # experts that have biases are not divided


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each layout gives for all models, run once: ranks are started per layout, not per model."""

    @functools.cache
    def of(layout):
        folder = tmp_path_factory.mktemp(str(layout))
        names = [name for name, of_case in CASES if of_case == layout]
        ranks = run_ranks(layout.world_size, pretrained.run_on_rank, names, layout, folder, timeout=240)
        return folder, ranks

    return of


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_logits_are_transformers(name, layout, results):
    expected = pretrained.truth(name)["logits"]
    assert max(float(value.abs().max()) for value in expected) > 0.3, "too small to tell models apart"
    for rank in results(layout)[1]:
        for seen, wanted in zip(rank[name]["logits"], expected, strict=True):
            torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_what_came_in_goes_out(name, layout, results):
    before = results(layout)[0] / name / "before"
    assert len(list(before.glob("*.safetensors"))) > 1, "max_shard_size was not kept"
    back, original = pretrained.load(name, before), pretrained.new_model(name)
    assert back.state_dict().keys() == original.state_dict().keys()
    for key, value in original.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    theirs = {k: v for k, v in original.config.to_diff_dict().items() if k not in ("transformers_version", "dtype")}
    assert {key: back.config.to_dict()[key] for key in theirs} == theirs
    for seen, wanted in zip(pretrained.logits(back, name), pretrained.truth(name)["logits"], strict=True):
        assert torch.equal(seen, wanted)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_training_is_transformers(name, layout, results):
    folder, ranks = results(layout)
    expected = pretrained.truth(name)
    for rank in ranks:
        assert rank[name]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    trained = pretrained.load(name, folder / name / "after").state_dict()
    moved = pretrained.new_model(name).state_dict()
    for key, value in expected["weights"].items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-4)
    assert max(float((value - moved[key]).abs().max()) for key, value in expected["weights"].items()) > 3e-3


def test_every_family_is_here():
    from lightning_megatron.hf import known_families

    assert {pretrained.new_model(name).config.model_type for name in pretrained.MODELS} == set(known_families())
    assert transformers.__version__
