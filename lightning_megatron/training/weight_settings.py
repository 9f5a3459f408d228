"""What each weight is trained with, by its group of the optimizer: the same for all that hold a copy or a part."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_megatron.distributed import collectives, process_groups

# A group's numbers as text, so that those of other processes compare.
Setting = dict[str, str]

_FROZEN: Setting = {"requires_grad": "False"}
_IN_NO_GROUP: Setting = {"group": "none"}
_NO_SETTINGS = ("params", "param_names", "name")
_COMPARABLE = (bool, int, float, str, tuple, list, torch.Tensor, type(None))


def check(parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: Optimizer) -> None:
    """Refuse an optimizer that trains copies of one weight in two ways, or not all that requires gradients.

    Copies would drift apart, and a checkpoint, which has one of them, would not be what was trained. Called by all
    ranks, and raises on all.

    Args:
        parameters: This rank's, under the whole model's names.
        optimizer: What ``configure_optimizers`` returned.

    Raises:
        MisconfigurationException: Names the weight, the ranks and their settings.
        ValueError: A weight is in no group.
    """
    settings, problems = _settings(parameters, optimizer)
    problems += _differences(settings, process_groups.pipeline(), "pipeline stages")
    for group, who in (
        (process_groups.tensor_parallel(), "tensor-parallel ranks"),
        (process_groups.data_parallel(), "replicas"),
    ):
        if len(set(collectives.gather(_digest(settings), group))) > 1:  # all is sent only where something differs
            problems += _differences(settings, group, who)
    found = [problem for each in collectives.gather(problems[:1], _world()) for problem in each]
    if found:
        raise found[0]


def _settings(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: Optimizer
) -> tuple[dict[str, Setting], list[Exception]]:
    """Each weight's setting on this rank; and what is wrong with them by themselves."""
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
    """What a rank of ``group`` sets otherwise than one before it."""
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
        return ", ".join(f"{key}={value}" for key, value in mine.items() if theirs.get(key) != value) or "nothing more"

    return MisconfigurationException(
        f"configure_optimizers trains {name} in two ways: {who} hold one weight, or parts of one, with"
        f" {only(one, other)} and with {only(other, one)}. The model would differ from every checkpoint of it. Choose"
        " groups by what is the same on every rank, such as the names of self.named_parameters()."
    )


def _digest(settings: dict[str, Setting]) -> int:
    return zlib.crc32(repr(sorted((name, sorted(setting.items())) for name, setting in settings.items())).encode())


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world
