"""Parameter groups by patterns, with any optimizer of torch."""

import functools

import pytest
import torch

from lightning_megatron import ParameterGroups, biases_and_vectors


def test_patterns_name_parameters_too():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    patterns = ParameterGroups(no_weight_decay=["1.*"]).split(model.named_parameters())
    assert {name: list(members) for name, members in patterns.items()} == {
        "default": ["0.weight", "0.bias"],
        "no_weight_decay": ["1.weight", "1.bias"],
    }


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_any_torch_optimizer(optimizer):
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    make = functools.partial(optimizer, lr=0.5, weight_decay=0.25)
    conditions = ParameterGroups(make, no_weight_decay=biases_and_vectors, scale_lr=["bias"], lr_mult=2.0)
    groups = conditions.build(model.named_parameters()).param_groups
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        (0, 0.5, 0.25),
        (0, 0.5, 0.0),
        (0, 1.0, 0.25),
        (1, 1.0, 0.0),
    ]
