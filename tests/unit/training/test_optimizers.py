"""The steps of the package's own optimizers are those of torch's."""

import functools

import pytest
import torch

from lightning_megatron import LeanAdamW, Muon
from lightning_megatron.training import optimizer_factory
from lightning_megatron.training.optimizer import take_settings
from lightning_megatron.training.optimizers.state_size import states_of
from tests.reference.rounded_adamw import Rounded

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def steps_of(make, count=6):
    """Weights after each of some steps on random gradients."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(3))
    weights = [torch.nn.Parameter(draw(4, 3)), torch.nn.Parameter(draw(5))]
    optimizer = make(weights)
    seen = []
    for _ in range(count):
        for weight in weights:
            weight.grad = draw(weight.shape)
        optimizer.step()
        seen.append([weight.detach().clone() for weight in weights])
    return seen, optimizer


@pytest.mark.parametrize(
    ("chosen", "fused"),
    [({}, True), ({"fused": False}, False), ({"foreach": False}, None), ({"capturable": True}, None)],
)
def test_the_kernel_is_fused_unless_another_is_chosen(chosen, fused):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], **chosen)
    optimizer_factory._choose_fused(optimizer)
    assert optimizer.param_groups[0]["fused"] is fused


def test_lean_adamw_in_fp32_is_torchs():
    expected, _ = steps_of(lambda weights: torch.optim.AdamW(weights, **SETTINGS, fused=True))
    seen, _ = steps_of(lambda weights: LeanAdamW(weights, **SETTINGS, on_host=True))
    assert all(map(torch.equal, sum(seen, []), sum(expected, [])))


def test_moments_in_bf16_are_rounded_after_each_step():
    expected, _ = steps_of(lambda weights: Rounded(weights, **SETTINGS, fused=True))
    plain, _ = steps_of(lambda weights: torch.optim.AdamW(weights, **SETTINGS, fused=True))
    both = {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}
    seen, optimizer = steps_of(lambda weights: LeanAdamW(weights, **SETTINGS, **both))
    assert all(map(torch.equal, sum(seen, []), sum(expected, [])))
    assert not torch.equal(seen[-1][0], plain[-1][0])
    kinds = {name: value.dtype for name, value in next(iter(optimizer.state.values())).items()}
    assert kinds == {"step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_withheld_step_changes_nothing(kind):
    _, optimizer = steps_of(lambda weights: LeanAdamW(weights, **SETTINGS, exp_avg_dtype=kind))
    before = [value.clone() for state in optimizer.state.values() for value in state.values()]
    weights = [weight.detach().clone() for weight in optimizer.param_groups[0]["params"]]
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, [v for state in optimizer.state.values() for v in state.values()], before))
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], weights))


def test_an_average_over_too_many_steps_for_bf16_is_refused():
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"betas=\(0.9, 0.999\), exp_avg_sq_dtype='bfloat16'.* of at most 0.98"):
        LeanAdamW([weight], exp_avg_sq_dtype="bfloat16")
    LeanAdamW([weight], exp_avg_dtype="bfloat16")


@pytest.mark.parametrize("name", ["maximize", "amsgrad"])
def test_what_lean_adamw_lacks_is_refused_in_a_group_too(name):
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=f"{name}=True"):
        LeanAdamW([{"params": [weight], name: True}])


def test_settings_of_a_checkpoint_that_bf16_cannot_follow_are_refused():
    made = LeanAdamW([torch.nn.Parameter(torch.zeros(2))], betas=(0.9, 0.95), exp_avg_sq_dtype="bfloat16")
    take_settings(made, {"groups": [{"betas": (0.9, 0.97)}]})
    with pytest.raises(ValueError, match="at most 0.98"):
        take_settings(made, {"groups": [{"betas": (0.9, 0.999)}]})


def test_muon_refuses_weights_that_do_not_say_what_they_are():
    with pytest.raises(ValueError, match="no weights of a Megatron module"):
        Muon(torch.nn.Linear(2, 2).parameters())


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_torchs(adjust):
    def marked(weights):
        for weight in weights:
            weight.tensor_model_parallel = False
        return Muon(weights, lr=1e-2, adjust_lr_fn=adjust)

    class Both:
        def __init__(self, weights):
            self.parts = [
                torch.optim.Muon([weights[0]], lr=1e-2, weight_decay=0.1, adjust_lr_fn=adjust),
                torch.optim.AdamW([weights[1]], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
            ]

        def step(self):
            for part in self.parts:
                part.step()

    expected, _ = steps_of(Both)
    seen, _ = steps_of(marked)
    for mine, theirs in zip(sum(seen, []), sum(expected, []), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("chosen", "on_cpu", "on_gpu"),
    [({}, 2, 2), ({"exp_avg_dtype": "bfloat16"}, 1.5, 1.5), ({"on_host": True}, 2, 0)],
)
def test_its_moments_are_counted_where_they_are(chosen, on_cpu, on_gpu):
    optimizer = LeanAdamW([torch.nn.Parameter(torch.zeros(2))], **chosen)
    assert states_of(optimizer, "cpu") == on_cpu
    assert states_of(optimizer, "cuda") == on_gpu
