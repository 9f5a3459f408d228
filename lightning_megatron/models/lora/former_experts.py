"""Joins the updates of experts that were linear layers of their own, as adapters of transformers before 5 have them.

Each expert had a layer for its gate, one for what this gates and one for its output; now all experts have one tensor
for the first two and one for the last. Two updates side by side are one of twice the rank, whose ``B`` has two blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict

import torch
import torch.nn.functional as F

Pair = tuple[torch.Tensor, torch.Tensor]

_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight")
_GATE, _UP, _DOWN = ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")
_FORMER, _BLOCK = ".block_sparse_moe", ".mlp"  # Mixtral's name of router and experts, then and now


def joined(updates: dict[str, Pair]) -> dict[str, Pair]:
    """The updates by today's names, those of experts as ``[experts, ...]``.

    Args:
        updates: ``A`` and ``B`` by transformers' name of the weight.
    """
    blocks: defaultdict[str, dict[tuple[int, str], Pair]] = defaultdict(dict)
    found = {}
    for name, pair in updates.items():
        if match := _EXPERT.fullmatch(name):
            blocks[match[1]][int(match[2]), match[3]] = pair
        else:
            found[name] = pair
    former = tuple(block for block in blocks if block.endswith(_FORMER))  # whose routers may have updates, too
    found = {_today(name) if former and name.startswith(former) else name: pair for name, pair in found.items()}
    for block, layers in blocks.items():
        count = 1 + max(number for number, _ in layers)
        gate, up, down = (_stacked(layers, leaves, count) for leaves in (_GATE, _UP, _DOWN))
        if down is not None:
            found[f"{_today(block)}.experts.down_proj"] = down
        if gate is not None or up is not None:
            found[f"{_today(block)}.experts.gate_up_proj"] = _side_by_side(gate, up)
    return found


def of_one_rank(updates: dict[str, Pair]) -> dict[str, Pair]:
    """Updates that do the same, all of the largest rank among them: ``A`` and ``B`` have zeros behind."""
    rank = max((up.size(-1) for _, up in updates.values()), default=0)
    return {
        name: (F.pad(down, (0, 0, 0, rank - up.size(-1))), F.pad(up, (0, rank - up.size(-1))))
        for name, (down, up) in updates.items()
    }


def _today(name: str) -> str:
    return name.replace(_FORMER, _BLOCK)


def _stacked(layer: dict[tuple[int, str], Pair], leaves: tuple[str, ...], count: int) -> Pair | None:
    """``A`` and ``B`` of all experts, zeros for those without an update; None if none has one."""
    own = {number: pair for (number, leaf), pair in layer.items() if leaf in leaves}
    if not own:
        return None
    nothing = tuple(torch.zeros_like(half) for half in next(iter(own.values())))
    down, up = (torch.stack([own.get(number, nothing)[half] for number in range(count)]) for half in (0, 1))
    return down, up


def _side_by_side(gate: Pair | None, up: Pair | None) -> Pair:
    """One update of both halves, each of which has ``A`` and ``B`` of its own."""
    there = gate or up
    assert there is not None
    nothing = torch.zeros_like(there[0]), torch.zeros_like(there[1])
    (gate_down, gate_up), (up_down, up_up) = gate or nothing, up or nothing
    rank = there[1].size(-1)
    return torch.cat((gate_down, up_down), dim=1), torch.cat(
        (F.pad(gate_up, (0, rank)), F.pad(up_up, (rank, 0))), dim=1
    )
