"""The package's own optimizers train as plain PyTorch does with the same optimizer, and resume, in any layout.

bf16 rounds a value that lies between two numbers to either, by sums in another order: hence bands wider than fp32's.
"""

from functools import partial

import pytest
import torch

from lightning_megatron import LeanAdamW, Muon
from tests.reference import parallel_experts, plain_experts, plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.reference.plain_experts import MIXTURE
from tests.reference.rounded_adamw import Rounded
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool
from tests.support.trainer import loader, trainer

SMALL, ROWS, STEPS, CLIP = plain_gpt.replace(plain_gpt.LLAMA, num_layers=2), 8, 6, 0.5
BF16 = {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}
MUON = {"lr": 1e-3, "weight_decay": 0.1}
OTHERS = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-3}
lean = partial(LeanAdamW, **plain_gpt.ADAM, on_host=True)
rounded = partial(LeanAdamW, **plain_gpt.ADAM, **BF16)
muon = partial(Muon, **MUON, eps=1e-3)


class Made(LoadedGPT):
    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def fit(make, layout, steps, load=None, save=None, full=None, precision="32-true"):
    """This rank's weights after a fit, and the largest distance to ``full``."""
    module = Made(SMALL)
    module.make_optimizer = make
    run = trainer(layout, precision=precision, max_steps=steps, gradient_clip_val=CLIP)
    samples = Rows(text_samples(SMALL, ROWS * STEPS))
    run.fit(module, loader(samples, layout, ROWS, run), ckpt_path=load)
    if save:
        run.save_checkpoint(save)
    kinds = {v.dtype for s in run.optimizers[0].state.values() for n, v in s.items() if n != "step"}
    weights = {name: weight.detach().clone() for name, weight in module.named_shards()}
    return weights, module.distance(full) if full else None, kinds


class PlainMuon:
    """torch's Muon for the matrices of linear layers, its AdamW for the rest."""

    adjust = "match_rms_adamw"

    def __init__(self, weights):
        matrices = [weight for name, weight in weights.items() if "linear_" in name and weight.dim() == 2]
        others = [weight for weight in weights.values() if all(weight is not matrix for matrix in matrices)]
        self.parts = [torch.optim.Muon(matrices, **MUON, adjust_lr_fn=self.adjust), torch.optim.AdamW(others, **OTHERS)]

    def step(self):
        for part in self.parts:
            part.step()


class PlainMuonOfExperts(PlainMuon):
    """It has each expert's matrix by itself, and its step depends on rows over columns."""

    adjust = "original"

    def __init__(self, weights):
        self.stacks = [weight for weight in weights.values() if weight.dim() == 3]
        self.pieces = [[torch.nn.Parameter(each) for each in stack.detach()] for stack in self.stacks]  # views
        routers = {name: weight for name, weight in weights.items() if weight.dim() < 3}
        super().__init__(routers)
        every = [piece for pieces in self.pieces for piece in pieces]
        self.parts.append(torch.optim.Muon(every, **MUON, adjust_lr_fn=self.adjust))

    def step(self):
        for stack, pieces in zip(self.stacks, self.pieces, strict=True):
            for piece, gradient in zip(pieces, stack.grad, strict=True):
                piece.grad = gradient
        super().step()


def truth(make):
    samples = text_samples(SMALL, ROWS * STEPS)
    return plain_gpt.train(SMALL, samples, ROWS, STEPS, CLIP, make=make)["weights"]


CASES = [
    (lean, lambda w: torch.optim.AdamW(w.values(), **plain_gpt.ADAM), True, 1e-5),
    (rounded, lambda w: Rounded(w.values(), **plain_gpt.ADAM), True, 1e-4),
    (muon, PlainMuon, False, 3e-4),
]


@pytest.mark.parametrize(("make", "plain", "sharded", "band"), CASES, ids=["host", "bf16", "muon"])
def test_trains_as_plain_pytorch_does(make, plain, sharded, band):
    full = truth(plain)
    moved = max(float((full[n] - w).abs().max()) for n, w in plain_gpt.initial_weights(SMALL).items())
    assert moved > 15 * band, "the truth has hardly moved"
    for layout in (Layout(dp=2, sharded=sharded), Layout(tp=2, sp=True, sharded=sharded), Layout(pp=2, sharded=False)):
        for _, distance, _ in run_in_pool(2, fit, make, layout, STEPS, None, None, full):
            assert distance < band, layout


@pytest.mark.parametrize(
    ("make", "sharded"), [(lean, True), (rounded, True), (muon, False)], ids=["host", "bf16", "muon"]
)
def test_resumes_to_the_bit_and_with_other_replicas(make, sharded, tmp_path):
    layout = Layout(dp=2, sharded=sharded)
    whole = run_in_pool(2, fit, make, layout, STEPS)
    run_in_pool(2, fit, make, layout, 3, None, tmp_path / "saved")
    resumed = run_in_pool(2, fit, make, layout, STEPS, tmp_path / "saved")
    for (expected, _, kinds), (seen, _, again) in zip(whole, resumed, strict=True):
        assert kinds == again
        assert all(torch.equal(seen[name], expected[name]) for name in expected)
    full = whole[0][0]
    for other in (Layout(sharded=sharded), Layout(tp=2, sharded=sharded)):
        ranks = run_in_pool(other.world_size, fit, make, other, STEPS, tmp_path / "saved", None, full)
        assert all(distance < 3e-4 for _, distance, _ in ranks), other


def test_adamw_goes_on_from_lean_adamw_and_back(tmp_path):
    layout, plain = Layout(dp=2), partial(torch.optim.AdamW, **plain_gpt.ADAM, fused=True)
    (whole, _, _), _ = run_in_pool(2, fit, lean, layout, STEPS)
    for first, second in ((lean, plain), (plain, lean)):
        run_in_pool(2, fit, first, layout, 3, None, tmp_path / "saved")
        (seen, _, _), _ = run_in_pool(2, fit, second, layout, STEPS, tmp_path / "saved")
        assert all(torch.equal(seen[name], whole[name]) for name in whole)


def test_muon_on_shards_is_refused():
    with pytest.raises(RankError, match=r"shards torch.optim.AdamW, Adam and SGD, and LeanAdamW, not Muon"):
        run_in_pool(2, fit, muon, Layout(dp=2), 1)


def test_muon_orthogonalises_each_experts_matrix():
    config, samples = MIXTURE, text_samples(MIXTURE, ROWS * STEPS)
    full = plain_experts.train(config, samples, ROWS, STEPS, CLIP, make=PlainMuonOfExperts)["weights"]
    for layout in (Layout(dp=2, ep=2, sharded=False), Layout(dp=2, etp=2, sharded=False)):
        train = partial(parallel_experts.train, full=full, make=partial(muon, adjust_lr_fn="original"))
        for rank in run_in_pool(2, train, config, layout, ROWS, STEPS, CLIP):
            assert rank["distance"] < 3e-4, layout
