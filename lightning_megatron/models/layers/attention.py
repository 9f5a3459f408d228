"""Core attention by ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention


class TorchAttention(torch.nn.Module):
    """Softmax attention over this rank's heads, with grouped queries; built by megatron-core's ``SelfAttention``.

    Args:
        config: Megatron's transformer configuration.
        layer_number: Number of the layer in the whole model, from 1.
        attn_mask_type: Causal, or padding for bidirectional attention.
        attention_type: "self" or "cross".
        attention_dropout: Probability; None takes the configuration's.
        softmax_scale: Factor on the scores; None is one over the root of the head's size.
        **_: Arguments that only other implementations read (context parallelism, process groups).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.window = None  # tokens that a query looks at, itself included
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0] + 1
        # Under sequence parallelism megatron-core has entered the tensor-parallel random state around the block.
        self.in_parallel_rng = config.sequence_parallel

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Compute the attention of this rank's heads.

        Args:
            query: ``[s, b, heads/tp, head]``.
            key: ``[s, b, groups/tp, head]``, as ``value``.
            value: ``[s, b, groups/tp, head]``.
            attention_mask: ``[b, 1, s, s]``, True where a query may not look (Megatron's convention); includes the
                causal part. None is plain causal attention, or none masked.
            attn_mask_type: Overrides the kind that the layer was built with.
            attention_bias: ``[1, heads/tp, s, s]``, added to the scores; the mask then has to hold the causal part.
            packed_seq_params: Must be None.

        Returns:
            ``[s, b, heads/tp · head]``.
        """
        if packed_seq_params is not None:
            raise ValueError("TorchAttention takes no packed sequences.")
        length, batch = query.shape[:2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, head]
        causal = self.causal if attn_mask_type is None else attn_mask_type == AttnMaskType.causal
        if self.window is not None and k.size(2) > self.window:
            attention_mask = _beyond_window(attention_mask, q.size(2), k.size(2), self.window, q.device)
        dropout = self.dropout if self.training else 0.0
        forked = get_cuda_rng_tracker().fork() if dropout and not self.in_parallel_rng else nullcontext()
        with forked:
            context = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=_added_to_scores(attention_mask, attention_bias),
                is_causal=causal and attention_mask is None and attention_bias is None,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            )
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)


def pad_mask(mask: torch.Tensor | None, queries: int, keys: int) -> torch.Tensor | None:
    """A mask for ``queries`` and ``keys`` more tokens at the end: no query looks at the new keys but new queries.

    Args:
        mask: ``[b, 1, s or 1, s]``, True where a query may not look; None stays None.
        queries: Tokens to add to the dimension of the queries, unless that is 1.
        keys: Tokens to add to the dimension of the keys.
    """
    if mask is None:
        return None
    mask = F.pad(mask, (0, keys), value=True)
    return F.pad(mask, (0, 0, 0, queries), value=False) if mask.size(-2) > 1 else mask  # a softmax needs a key


def _beyond_window(
    mask: torch.Tensor | None, queries: int, keys: int, window: int, device: torch.device
) -> torch.Tensor:
    """``mask``, or the causal one, True as well where a key lies too far behind; the last query meets the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    unseen = distance >= window
    return unseen | (distance < 0) if mask is None else mask | unseen


def _added_to_scores(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """torch's ``attn_mask``: True where a query may look, or numbers where there is a bias."""
    if bias is None:
        return None if mask is None else ~mask
    return bias if mask is None else bias.masked_fill(mask, float("-inf"))
