"""What ``TrainingMonitor`` says of experts is what the plain mixture did, however experts and tokens are divided."""

import functools

import pytest

from lightning_megatron.callbacks import TrainingMonitor
from tests.reference import parallel_experts
from tests.reference.parallel_experts import STEPS, config_of, truth
from tests.reference.same_training import CLIP, ROWS
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool

CASES = [
    ("MIXTURE", Layout(), {}, ""),
    ("ODD", Layout(pp=2, vp=2, dp=2, ep=2), {}, ""),
    ("MIXTURE", Layout(tp=2, cp=2, ep=2, sp=True), {}, ""),
    ("BIASED", Layout(pp=2), {"layers": (2, 3)}, ""),  # the first stage has no experts
    ("MIXTURE", Layout(dp=2, ep=2), {"capacity_factor": 1.25}, "replicas"),
]


@pytest.mark.parametrize(("name", "layout", "experts", "cut"), CASES, ids=str)
def test_what_the_plain_mixture_did(name, layout, experts, cut, tmp_path):
    config, expected = config_of(name, **experts), truth(name, cut, **experts)
    monitor = TrainingMonitor(expert_layers=name != "ODD", expert_pictures=STEPS, directory=tmp_path)
    accumulate = 1 if cut else 3
    ranks = run_in_pool(
        layout.world_size, functools.partial(parallel_experts.train, monitor=monitor),
        config, layout, ROWS, STEPS, CLIP, accumulate, timeout=240,
    )  # fmt: skip
    assert all(rank["logged"] == ranks[0]["logged"] and rank["experts"] == ranks[0]["experts"] for rank in ranks)
    seen, load, logged = expected["seen"], ranks[0]["experts"], ranks[0]["logged"]
    assert [layer.layer for layer in load.layers] == sorted(seen.counts)
    for layer in load.layers:
        assert list(layer.tokens) == seen.counts[layer.layer].tolist()
        assert layer.entropy == pytest.approx(seen.entropies[layer.layer], rel=1e-4)
        assert layer.z_loss == pytest.approx(seen.z_losses[layer.layer], rel=1e-4)
        assert layer.dropped == pytest.approx(seen.dropped[layer.layer], abs=1e-6)
        assert (layer.aux_loss is None) == (name == "BIASED")
        if name != "ODD":
            assert logged[f"experts/layer_{layer.layer}/tokens_1"] == layer.tokens[1] > 0
            assert logged[f"experts/layer_{layer.layer}/entropy"] == pytest.approx(layer.entropy)
    weights = config.experts.aux_weight, config.experts.z_weight
    added = sum((layer.aux_loss or 0.0) * weights[0] + layer.z_loss * weights[1] for layer in load.layers)
    assert added == pytest.approx(expected["added"][-1], rel=1e-4, abs=1e-6)
    loads = [float(load) for n in seen.counts for load in seen.counts[n] / seen.counts[n].mean()]
    assert (logged["experts/max_load"], logged["experts/min_load"]) == pytest.approx((max(loads), min(loads)))
    assert logged["experts/entropy"] == pytest.approx(sum(seen.entropies.values()) / len(seen.entropies), rel=1e-4)
    assert any(key.startswith("experts/layer_") for key in logged) == (name != "ODD")
    assert (tmp_path / f"step-{STEPS}.png").stat().st_size > 5000
