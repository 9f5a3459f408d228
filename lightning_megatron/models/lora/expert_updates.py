"""Translates the updates of experts to the names and shapes that ``peft`` stores them with, and back.

``peft`` wraps the module that holds the experts once for each of its tensors that has updates, the first tensor
innermost, and stores one ``A`` and one ``B`` of all experts: ``[experts · rank, in]``, expert by expert, and
``[out, rank · experts]``, the experts innermost.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

Pair = tuple[torch.Tensor, torch.Tensor]

_INNER = ".base_layer"
_ORDER = ("gate_up_proj", "down_proj")  # the tensors of transformers' experts, as its modules hold them


def path(name: str, updated: Collection[str]) -> str:
    """The module of ``peft``'s that holds the update of a tensor; ``updated`` are all tensors that have one."""
    module, _, leaf = name.rpartition(".")
    later = _ORDER[_ORDER.index(leaf) + 1 :]
    return module + _INNER * sum(f"{module}.{other}" in updated for other in later)


def flat(down: torch.Tensor, up: torch.Tensor) -> Pair:
    """``peft``'s matrices of ``A`` ``[experts, rank, in]`` and ``B`` ``[experts, out, rank]``."""
    return down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)


def stacked(pairs: dict[str, Pair], rank: int, targets: list[str], joint_rank: int) -> dict[str, Pair]:
    """The updates by transformers' names, those of experts as ``[experts, ...]``.

    Args:
        pairs: ``A`` and ``B`` by the weight of the module that holds them.
        rank: Rank of each update.
        targets: ``peft``'s ``target_parameters``.
        joint_rank: Rank of those of ``gate_up_proj``.

    Raises:
        ValueError: Updates of a tensor that experts here do not have.
    """
    leaves = {target.rpartition(".")[2] for target in targets}
    ordered = [leaf for leaf in reversed(_ORDER) if leaf in leaves]  # the outermost first
    found = {}
    for name, (down, up) in pairs.items():
        if not targets or down.size(0) == rank:
            found[name] = down, up
            continue
        module = name.removesuffix(".weight")
        depth = module.count(_INNER)
        leaf = ordered[depth] if depth < len(ordered) else ""
        own = joint_rank if leaf == "gate_up_proj" else rank
        if leaves - set(_ORDER) - {"weight"} or not leaf or down.size(0) % own:
            raise ValueError(
                f"The adapter has an update of {module} by target_parameters={sorted(targets)}, which is no tensor of"
                f" experts here. There are {' and '.join(_ORDER)}."
            )
        weights = down.unflatten(0, (-1, own)), up.unflatten(1, (own, -1)).permute(2, 0, 1)
        found[f"{module.removesuffix(_INNER * depth)}.{leaf}"] = weights
    return found
