"""What multi-latent attention keeps for the backward pass, tensor by tensor."""

from __future__ import annotations

from typing import Any

from lightning_megatron.distributed.layout import ContextComm


def kept(
    latent: Any, tokens: float, heads: float, device: str, way: ContextComm | None, recomputed: list[str], output: float
) -> float:
    """Numbers that are kept of one layer: queries, keys, values, and the output.

    Rotation makes new queries and keys, so that the projections' outputs are free. A CPU takes heads of one size, which
    are copies. What an all-to-all or an all-gather keeps beside, ``context_parallel_memory.kept_beside`` says.

    Args:
        latent: The configuration's ``latent_attention``.
        tokens: Tokens of a micro-batch, on this rank.
        heads: Heads of a rank.
        device: "cuda" or "cpu".
        way: How attention reaches across ranks; None: no ranks share a sequence.
        recomputed: The modules that are recomputed.
        output: The share of layers in which the output layer keeps its input.
    """
    query, value = latent.qk_head_dim, latent.v_head_dim
    wide, copies = max(query, value), 0
    if device == "cpu" and query != value and "core_attn" not in recomputed:
        copies = (1 if value < query else 2) * wide
    made = 3 * wide - copies if copies else 2 * query + value  # those that are no copies
    if "mla_up_proj" in recomputed:
        made = 0
    found = output * value if copies or "core_attn" in recomputed else value
    found += wide if copies else 0
    beside = value if way in ("all_to_all", "all_gather") else 0
    return tokens * heads * (made + copies + found + beside)


def kept_by_norms(latent: Any, own: float, element: int, in_pieces: int) -> float:
    """Bytes that the norms of latents keep: input and output, which the linear layer behind it keeps.

    Args:
        latent: The configuration's ``latent_attention``.
        own: Tokens of a micro-batch that a rank has between the tensor-parallel blocks.
        element: Bytes of a number.
        in_pieces: fp32 numbers that are kept in place of the input, where torch has no norm of one piece; else 0.
    """
    inside = 4 * in_pieces or element
    return own * (float(latent.normed) * (inside + element) + 8 * (1 if latent.q_lora_rank is None else 2))
