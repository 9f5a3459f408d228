"""Attention of a token that is written to the latents of all before it, without keys and values of the heads.

A key is a product ``K c`` with the latent ``c``, so that a score is ``q · K c = (Kᵀ q) · c``; and a head's output is
``V (Σ p c)``. Two products of the new token take the place of those of all tokens (DeepSeek-V2, arXiv 2405.04434,
section 2.1.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attend_to_latents(
    query: torch.Tensor, latents: torch.Tensor, up: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The output of one token's attention, ``[1, b, heads · channels of a value]``.

    Args:
        query: ``[1, b, heads, plain + rotated]``, its last channels rotated.
        latents: ``[s, b, 1, rank + rotated]``: each token's latent, and the rotated key that all heads share.
        up: ``[heads, plain + channels of a value, rank]``, which makes a head's key and value of a latent.
        mask: ``[b, 1, 1, s]``, True where the token may not look; None: it looks at all.
        scale: Factor on the scores.
    """
    rank = up.size(-1)
    plain = query.size(-1) - latents.size(-1) + rank
    of_key, of_value = up[:, :plain], up[:, plain:]
    narrow = (query[0, ..., :plain].transpose(0, 1) @ of_key).transpose(0, 1)  # [b, heads, rank]
    # All heads look at the same keys: for the kernel they are the queries of one head.
    queries = torch.cat((narrow, query[0, ..., plain:]), dim=-1)[:, None]
    keys = latents.permute(1, 2, 0, 3)  # [b, 1, s, rank + rotated]
    seen = None if mask is None else ~mask
    # The values are the latents alone; the further channels are cheaper than a copy without them.
    found = F.scaled_dot_product_attention(queries, keys, keys, attn_mask=seen, scale=scale)[:, 0, :, :rank]
    return (found.transpose(0, 1) @ of_value.mT).transpose(0, 1).flatten(1)[None]
