"""Warns of weights that every tensor-parallel rank holds, and trains on its own part of their gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_megatron.distributed import process_groups
from lightning_megatron.training.counted_once import is_divided_expert

_APART, _SMALL = 0.05, 1e-3  # of the weight's own gradient; of the largest, below which rounding is seen


@torch.no_grad()
def warn_of_partial(chunks: Iterable[torch.nn.Module]) -> bool:
    """Warn of whole weights whose gradients differ between tensor-parallel ranks, once these are final.

    A weight that ranks see through their own part of the sequence, or of the heads, has a part of its gradient on each.
    megatron-core sums the parts of weights that are marked; of others the ranks' copies drift apart without an error.
    Tensor-parallel ranks may have other experts than one another, which are not compared.

    Args:
        chunks: The model chunks of this rank; all tensor-parallel ranks call this.

    Returns:
        Whether the gradients could tell: they are finite, and not all 0.
    """
    group = process_groups.tensor_parallel()
    whole = {
        name: gradient
        for chunk in chunks
        for name, weight in chunk.named_parameters()
        if not getattr(weight, "tensor_model_parallel", False)
        and not is_divided_expert(weight)
        and (gradient := getattr(weight, "main_grad", None)) is not None
    }
    if not whole:
        return True
    here = torch.stack([torch.stack([each.float().norm(), each.float().sum()]) for each in whole.values()])
    everyone = [torch.empty_like(here) for _ in range(group.size())]
    dist.all_gather(everyone, here, group=group)
    seen = torch.stack(everyone).cpu()  # [ranks, weights, 2]
    norms, spread = seen[..., 0].amax(0), (seen.amax(0) - seen.amin(0)).amax(-1)
    if not norms.isfinite().all() or not norms.any():
        return False
    apart = (spread > _APART * norms) & (norms > _SMALL * norms.amax())
    names = [name.removeprefix("module.") for name, differs in zip(whole, apart.tolist(), strict=True) if differs]
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        rank_zero_warn(
            f"The gradients of {shown} differ between the tensor-parallel ranks, which all hold these weights: each has"
            " a part, and the copies drift apart. Set weight.sequence_parallel = True where a rank sees a part of the"
            " sequence; where it sees its own heads or features, pass the weight through"
            " copy_to_tensor_model_parallel_region, which sums its gradient."
        )
    return True
