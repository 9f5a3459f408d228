"""Checks that all ranks which hold a copy or a part of a weight train it with the same optimizer settings."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_megatron.distributed import collectives, process_groups

# A group's settings as text, so that they can be compared between processes.
Setting = dict[str, str]

_FROZEN: Setting = {"requires_grad": "False"}
_IN_NO_GROUP: Setting = {"group": "none"}
_NO_SETTINGS = ("params", "param_names", "name")
_COMPARABLE = (bool, int, float, str, tuple, list, torch.Tensor, type(None))


def check(parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: Optimizer) -> None:
    """Refuse an optimizer that trains copies of one weight differently, or that lacks a weight.

    The copies would drift apart, and a checkpoint, which stores one of them, would not be the trained model. All ranks
    call this, and raise on all ranks.

    Args:
        parameters: This rank's parameters, under the whole model's names.
        optimizer: The optimizer that ``configure_optimizers`` returned.

    Raises:
        MisconfigurationException: Ranks train a weight differently; the text has the ranks and their settings.
        ValueError: A weight that requires gradients is in no group.
    """
    settings, problems = _settings(parameters, optimizer)
    problems += _differences(settings, process_groups.pipeline(), "pipeline stages")
    for group, who in (
        (process_groups.tensor_parallel(), "tensor-parallel ranks"),
        (process_groups.data_parallel(), "data-parallel ranks"),
    ):
        if len(set(collectives.gather(_digest(settings), group))) > 1:  # the settings are only sent if they differ
            problems += _differences(settings, group, who)
    found = [problem for each in collectives.gather(problems[:1], _world()) for problem in each]
    if found:
        raise found[0]


def _settings(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: Optimizer
) -> tuple[dict[str, Setting], list[Exception]]:
    """Return the settings of each weight on this rank, and the errors that this rank finds by itself."""
    of_group = [(_numbers(group), group["params"]) for group in optimizer.param_groups]
    known = {id(parameter): numbers for numbers, members in of_group for parameter in members}
    settings: dict[str, Setting] = {}
    problems: list[Exception] = []
    for name, parameter in parameters:
        setting = known.get(id(parameter), _IN_NO_GROUP) if parameter.requires_grad else _FROZEN
        before = settings.setdefault(name, setting)
        if before != setting:
            problems.append(_refusal(name, "two virtual stages of one rank", before, setting))
    missing = [name for name, setting in settings.items() if setting is _IN_NO_GROUP]
    if missing:
        problems.append(
            ValueError(
                f"{len(missing)} parameters require gradients but are in no group of the optimizer, {missing[0]!r}"
                " first. Pass them to the optimizer, or freeze them (requires_grad_(False))."
            )
        )
    return settings, problems


def _differences(settings: dict[str, Setting], group: dist.ProcessGroup, who: str) -> list[Exception]:
    """Return an error for each weight that ranks of ``group`` train differently."""
    seen: dict[str, tuple[int, Setting]] = {}
    found: list[Exception] = []
    for rank, theirs in enumerate(collectives.gather(settings, group)):
        for name, setting in theirs.items():
            first, before = seen.setdefault(name, (rank, setting))
            if before != setting:
                found.append(_refusal(name, f"{who} {first} and {rank}", before, setting))
    return found


def _numbers(group: dict[str, Any]) -> Setting:
    return {
        name: repr(value)
        for name, value in group.items()
        if name not in _NO_SETTINGS and isinstance(value, _COMPARABLE)
    }


def _refusal(name: str, who: str, one: Setting, other: Setting) -> MisconfigurationException:
    def only(mine: Setting, theirs: Setting) -> str:
        others = (f"{key}={value}" for key, value in mine.items() if theirs.get(key) != value)
        return ", ".join(others) or "no other setting"

    return MisconfigurationException(
        f"configure_optimizers trains {name} in two ways: {who} hold copies or parts of it, and train them with"
        f" {only(one, other)} and with {only(other, one)}. No checkpoint could hold both. Choose the groups by what is"
        " the same on every rank, such as the names of self.named_parameters()."
    )


def _digest(settings: dict[str, Setting]) -> int:
    return zlib.crc32(repr(sorted((name, sorted(setting.items())) for name, setting in settings.items())).encode())


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world
