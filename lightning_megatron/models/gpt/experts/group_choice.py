"""Chooses a token's experts within a few groups of them, which are held by as many machines.

megatron-core ranks groups by the sum of their ``top_k // top_k_groups`` best scores, which is DeepSeek-V3's rule for
its own sizes, and never DeepSeek-V2's.
"""

from __future__ import annotations

import torch

from lightning_megatron.models.gpt.experts.config import Experts


def choose_in_groups(
    logits: torch.Tensor, experts: Experts, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the experts ``[tokens, experts]``, 0 for those that a token does not use; and which it uses.

    Args:
        logits: The router's ``[tokens, experts]``.
        experts: The settings, whose ``groups`` are given.
        bias: ``[experts]``, added to the scores that choose, and to no weight. None: there is none.
    """
    scores = logits.float().softmax(-1) if experts.router == "softmax" else logits.float().sigmoid()
    choosing = scores if bias is None else scores + bias
    with torch.no_grad():
        grouped = choosing.unflatten(-1, (experts.groups, -1))  # [tokens, groups, experts of a group]
        of_groups = grouped.topk(experts.group_scores, dim=-1).values.sum(-1)
        best = of_groups.topk(experts.top_k_groups, dim=-1).indices
        left_out = torch.ones_like(of_groups, dtype=torch.bool).scatter(-1, best, False)
        allowed = grouped.masked_fill(left_out.unsqueeze(-1), float("-inf")).flatten(-2)
        top = allowed.topk(experts.top_k, dim=-1).indices
    weights = scores.gather(-1, top)
    if experts.normalize_top_k:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights.to(logits.dtype) * experts.scale
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, top, True)
    return torch.zeros_like(logits).scatter(-1, top, weights), chosen
