"""A checkpoint of divided experts is loaded under any other division, and resumed to the bit under its own."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_megatron import GPTConfig, GPTModule, LoRA
from tests.reference import plain_experts
from tests.reference.parallel_experts import LoadedMixture
from tests.reference.parallel_gpt import Rows, Watch, text_samples
from tests.reference.updated_experts import UpdatedMixture
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool
from tests.support.trainer import loader, trainer

SAVED = Layout(dp=2, ep=2)
ROWS, STEPS = 12, 6


def run(
    config: GPTConfig,
    layout: Layout,
    steps: int,
    path: str,
    saves: bool = False,
    resumes: bool = False,
    lora: LoRA | None = None,
) -> Any:
    module, watch = LoadedMixture(config) if lora is None else UpdatedMixture(config, lora=lora), Watch()
    run = trainer(layout, max_steps=steps, gradient_clip_val=0.5, callbacks=[watch])
    samples = Rows(text_samples(config, ROWS * STEPS))
    run.fit(module, loader(samples, layout, ROWS, run), ckpt_path=path if resumes else None)
    if saves:
        run.save_checkpoint(path)
    return watch.losses, watch.norms, {name: weight.detach().clone() for name, weight in module.named_shards()}


def resumed_to_the_bit(config: GPTConfig, layout: Layout, path: str, lora: LoRA | None = None) -> Any:
    """Train in one go, and in two; what the ranks saw in one go."""
    count = layout.world_size
    whole = run_in_pool(count, run, config, layout, STEPS, path, False, False, lora)
    run_in_pool(count, run, config, layout, STEPS // 2, path, True, False, lora)
    for seen, (losses, norms, weights) in zip(
        run_in_pool(count, run, config, layout, STEPS, path, False, True, lora), whole, strict=True
    ):
        assert (seen[0], seen[1]) == (losses[STEPS // 2 :], norms[STEPS // 2 :])
        assert all(torch.equal(seen[2][key], weights[key]) for key in weights)
    return whole


@pytest.mark.parametrize("name", ["ODD", "BIASED"])
def test_experts_reshard_and_resume(name, tmp_path):
    config, path = getattr(plain_experts, name), str(tmp_path / "half.ckpt")
    whole = resumed_to_the_bit(config, SAVED, path)
    others = [Layout(tp=2, etp=2, sp=True), Layout(dp=2, etp=2, sharded=False), Layout(pp=2, dp=2, ep=2), Layout()]
    for layout in others:
        for seen in run_in_pool(layout.world_size, run, config, layout, STEPS, path, False, True):
            assert seen[0] == pytest.approx(whole[0][0][STEPS // 2 :], rel=1e-5), layout
            assert seen[1] == pytest.approx(whole[0][1][STEPS // 2 :], rel=1e-4), layout


MIXTURE = replace(plain_experts.MIXTURE, init_method_std=0.3)  # so that the layers matter to the loss
DENSE = replace(MIXTURE, ffn_hidden_size=24, experts=None)


def val_loss(config: GPTConfig, layout: Layout, path: str, saves: bool = False, upcycle: bool = True) -> float:
    """The loss of a dense model that is saved, or of a mixture whose experts start as its layers."""
    module, run = GPTModule(config), trainer(layout)
    if not saves:
        module.load_weights(path, upcycle=upcycle)
    samples = Rows(text_samples(config, ROWS))
    (found,) = run.validate(module, loader(samples, layout, ROWS, run))
    if saves:
        run.save_checkpoint(path)
    return float(found["val_loss"])


def test_experts_start_as_copies_of_a_dense_layer(tmp_path):
    """The weights of a token's experts add up to 1, so that the mixture does what the dense model does."""
    path = str(tmp_path / "dense.ckpt")
    expected, _ = run_in_pool(2, val_loss, DENSE, Layout(tp=2), path, True)
    some = replace(DENSE, experts=replace(MIXTURE.experts, layers=[1, 2]))
    for config, layout in (
        (MIXTURE, Layout(dp=2, ep=2)),
        (MIXTURE, Layout(dp=2, etp=2)),
        (some, Layout(pp=2)),
    ):
        assert run_in_pool(2, val_loss, config, layout, path) == pytest.approx([expected] * 2, rel=1e-5), layout
    wider = replace(some, experts=replace(some.experts, ffn_hidden_size=20))
    for config, upcycle, says in (
        (DENSE, True, "the model has none"),
        (MIXTURE, False, r"upcycle=True"),
        (wider, True, r"is \[4, 40, 32\] in the model and \[4, 48, 32\] in the checkpoint"),
    ):
        with pytest.raises(RankError, match=says):
            run_in_pool(1, val_loss, config, Layout(), path, False, upcycle)


UPDATES = LoRA(rank=3, alpha=6, targets=["experts.linear_fc1", "experts.linear_fc2", "linear_proj"])


def test_updates_of_experts_reshard_and_resume(tmp_path):
    path = str(tmp_path / "half.ckpt")
    whole = resumed_to_the_bit(plain_experts.ODD, Layout(dp=4, ep=2, etp=2), path, UPDATES)
    for layout in (Layout(dp=2, ep=2), Layout(tp=2, pp=2, etp=2, sp=True), Layout(dp=2, etp=2, sharded=False)):
        ranks = run_in_pool(layout.world_size, run, plain_experts.ODD, layout, STEPS, path, False, True, UPDATES)
        for seen in ranks:
            assert seen[0] == pytest.approx(whole[0][0][STEPS // 2 :], rel=1e-5), layout
            assert seen[1] == pytest.approx(whole[0][1][STEPS // 2 :], rel=1e-4), layout


@pytest.mark.parametrize("lora", [None, replace(UPDATES, dropout=0.2)], ids=["weights", "updates"])
def test_experts_with_dropout_resume(lora, tmp_path):
    config = replace(plain_experts.BIASED if lora is None else plain_experts.ODD, hidden_dropout=0.2)
    whole = resumed_to_the_bit(config, Layout(dp=2, etp=2), str(tmp_path / "half.ckpt"), lora)
    assert whole[0][0] != pytest.approx(
        run_in_pool(2, run, replace(config, hidden_dropout=0.0), Layout(dp=2, etp=2), STEPS, "")[0][0], rel=1e-3
    )
