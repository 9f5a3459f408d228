"""A checkpoint of divided experts is loaded under any other division, and resumed to the bit under its own."""

from typing import Any

import pytest
import torch

from lightning_megatron import GPTConfig
from tests.reference import plain_experts
from tests.reference.parallel_experts import LoadedMixture
from tests.reference.parallel_gpt import Rows, Watch, text_samples
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import loader, trainer

SAVED = Layout(dp=2, ep=2)
ROWS, STEPS = 12, 6


def run(config: GPTConfig, layout: Layout, steps: int, path: str, saves: bool = False, resumes: bool = False) -> Any:
    module, watch = LoadedMixture(config), Watch()
    run = trainer(layout, max_steps=steps, gradient_clip_val=0.5, callbacks=[watch])
    samples = Rows(text_samples(config, ROWS * STEPS))
    run.fit(module, loader(samples, layout, ROWS, run), ckpt_path=path if resumes else None)
    if saves:
        run.save_checkpoint(path)
    return watch.losses, watch.norms, {name: weight.detach().clone() for name, weight in module.named_shards()}


@pytest.mark.parametrize("name", ["ODD", "BIASED"])
def test_experts_reshard_and_resume(name, tmp_path):
    config, path = getattr(plain_experts, name), str(tmp_path / "half.ckpt")
    whole = run_in_pool(2, run, config, SAVED, STEPS, path)
    run_in_pool(2, run, config, SAVED, STEPS // 2, path, True)
    for seen, (losses, norms, weights) in zip(
        run_in_pool(2, run, config, SAVED, STEPS, path, False, True), whole, strict=True
    ):
        assert (seen[0], seen[1]) == (losses[STEPS // 2 :], norms[STEPS // 2 :])
        assert all(torch.equal(seen[2][key], weights[key]) for key in weights)
    others = [Layout(tp=2, etp=2, sp=True), Layout(dp=2, etp=2, sharded=False), Layout(pp=2, dp=2, ep=2), Layout()]
    for layout in others:
        for seen in run_in_pool(layout.world_size, run, config, layout, STEPS, path, False, True):
            assert seen[0] == pytest.approx(whole[0][0][STEPS // 2 :], rel=1e-5), layout
            assert seen[1] == pytest.approx(whole[0][1][STEPS // 2 :], rel=1e-4), layout
