"""A torch optimizer that nothing shards, with what checkpoints and resumed settings ask of one that is sharded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_megatron.training.optimizer import ParameterSlice, check_kind, group_settings, take_settings


class WholeOptimizer:
    """The user's optimizer of a plain module that Lightning's own loop trains on one rank.

    Args:
        inner: The optimizer, before its first step.
        module: The module whose weights it updates.

    Attributes:
        initial_settings: The groups' settings at the start of the run, before any schedule has moved them.
        group_weight_names: The names of the weights in each group.
        group_parameters: The parameters of each group, frozen ones included.
    """

    def __init__(self, inner: Optimizer, module: torch.nn.Module) -> None:
        self.inner = inner
        self.initial_settings = group_settings(inner)
        self.group_parameters: list[list[torch.nn.Parameter]] = [list(group["params"]) for group in inner.param_groups]
        known = {id(parameter): name for name, parameter in module.named_parameters()}
        self.group_weight_names = [[known[id(p)] for p in group if id(p) in known] for group in self.group_parameters]

    @property
    def kind(self) -> str:
        """The optimizer's class, by its name."""
        return type(self.inner).__name__

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer itself."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        """The state of the optimizer itself."""
        return self.inner.state

    def parameter_slices(self) -> Iterator[ParameterSlice]:
        """Every parameter that is trained, as a whole."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield ParameterSlice(parameter, parameter, None)

    def state_dict(self) -> dict[str, Any]:
        """What ``ShardedOptimizer.state_dict`` gives of the same optimizer."""
        return {
            "name": self.kind,
            "groups": group_settings(self.inner),
            "given": self.initial_settings,
            "skipped_steps": 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the groups' settings of what ``state_dict`` of either kind gave.

        Raises:
            ValueError: It is the state of another kind of optimizer, or has other groups.
        """
        self.check_kind(state)
        take_settings(self.inner, state)
        self.initial_settings = state.get("given", self.initial_settings)

    def check_kind(self, state: dict[str, Any]) -> None:
        """Refuse the state of another kind of optimizer, or of other groups.

        Raises:
            ValueError: The kind or the groups differ; the message has both.
        """
        check_kind(self.kind, len(self.param_groups), state)
