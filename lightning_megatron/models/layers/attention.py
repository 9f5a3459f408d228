"""Core attention: the fastest of torch's kernels that computes what the layer, the batch and the device ask for."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention

from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models.layers import flex_attention, sdpa
from lightning_megatron.models.layers.attention_pattern import AttentionPattern, PatternParams, causal_pattern
from lightning_megatron.models.layers.attention_pieces import JOINED, Kernel, attend_in_pieces


class TorchAttention(torch.nn.Module):
    """Softmax attention over this rank's heads, with grouped queries; built by megatron-core's ``SelfAttention``.

    Args:
        config: Megatron's transformer configuration.
        layer_number: Number of the layer in the whole model, from 1.
        attn_mask_type: Causal, or padding for bidirectional attention.
        attention_type: "self" or "cross".
        attention_dropout: Probability; None takes the configuration's.
        softmax_scale: Factor on the scores; None is one over the root of the head's size.
        cp_comm_type: How attention reaches across the ranks that share a row; None: the best for the shape.
        **_: Arguments that only other implementations read (process groups).
    """

    kernel: str | None = None  # set by ``use_kernel``

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.shares_rows = config.context_parallel_size > 1
        self.is_cross = attention_type == "cross"
        self.causal = attn_mask_type == AttnMaskType.causal
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.window = None  # tokens that a query looks at, itself included
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            if not self.causal:
                raise ValueError(
                    f"extra={{'window_size': {config.window_size}}}: a window looks back only, and this is attention in"
                    " both directions. Leave it out."
                )
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

        Under context parallelism ``query``, ``key`` and ``value`` are this rank's shards of rows, the mask or pattern
        is that of whole rows, and the bias has this rank's queries and all keys.

        Args:
            query: ``[s, b, heads/tp, head]``.
            key: ``[s, b, groups/tp, head]``, as ``value``.
            value: ``[s, b, groups/tp, head]``.
            attention_mask: ``[b, 1, s, s]``, True where a query may not look (Megatron's convention); includes the
                causal part. None is plain causal attention, or none masked.
            attn_mask_type: Overrides the kind that the layer was built with.
            attention_bias: ``[1, heads/tp, s, s]``, added to the scores; the mask then has to hold the causal part.
            packed_seq_params: ``PatternParams``, which say who looks at whom in place of a mask; or None.

        Returns:
            ``[s, b, heads/tp · head]``.
        """
        if self.shares_rows:
            return self._over_ranks(query, key, value, attention_mask, attention_bias, _pattern(packed_seq_params))
        causal = self.causal if attn_mask_type is None else attn_mask_type == AttnMaskType.causal
        pattern = _pattern(packed_seq_params)
        window = self.window if self.window is not None and self.window < key.size(0) else None
        if attention_mask is None and attention_bias is None and pattern is None:
            if window is not None or (self.kernel == "flex" and causal):
                pattern = causal_pattern(key.size(0), query.size(0))
        elif pattern is None and window is not None:
            unseen = causal_pattern(key.size(0), query.size(0)).dense(window, query.device)
            attention_mask = unseen if attention_mask is None else attention_mask | unseen
        dropout = self.dropout if self.training else 0.0
        forked = get_cuda_rng_tracker().fork() if dropout and not self.in_parallel_rng else nullcontext()
        with forked:
            if pattern is None:
                found = self._masked(query, key, value, attention_mask, attention_bias, causal, dropout)
            else:
                found = self._patterned(query, key, value, pattern, window, dropout)
        return found.flatten(2)

    @property
    def shards_of_queries(self) -> SequenceShards:
        """Which queries of a row this rank has: a decoder's are zig-zag, for causal attention."""
        return SequenceShards.here(zigzag=self.causal or self.is_cross)

    def _over_ranks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        pattern: AttentionPattern | None,
    ) -> torch.Tensor:
        shards = self.shards_of_queries
        of_keys = SequenceShards.here(zigzag=self.causal)
        key, value = (of_keys.gather_with_gradients(x, 0) for x in (key, value))
        length, dropout = key.size(0), self.dropout if self.training else 0.0
        window = self.window if self.window is not None and self.window < length else None
        if self.causal and mask is None and pattern is None:
            pattern = causal_pattern(length, length)
        elif mask is not None and window is not None:
            mask = mask | causal_pattern(length, length).dense(window, query.device)
        forked = get_cuda_rng_tracker().fork() if dropout and not self.in_parallel_rng else nullcontext()
        parts = shards.parts(query.size(0) * shards.size)
        found = []
        with forked:
            for number, (part, each) in enumerate(zip(parts, query.split(len(parts[0])), strict=True)):
                if pattern is not None:
                    of_part = pattern.made(("part", part), functools.partial(pattern.part, part.start, part.stop))
                    found.append(self._patterned(each, key, value, of_part, window, dropout))
                    continue
                own = mask[:, :, part.start : part.stop] if mask is not None and mask.size(2) > 1 else mask
                of_bias = None if bias is None else bias[:, :, number * len(part) : (number + 1) * len(part)]
                found.append(self._masked(each, key, value, own, of_bias, False, dropout))
        return torch.cat(found).flatten(2)

    def _patterned(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pattern: AttentionPattern,
        window: int | None,
        dropout: float,
    ) -> torch.Tensor:
        """As ``forward``, ``[s, b, heads/tp, head]``: in blocks, in pieces, or with a mask of queries and keys."""
        if self.kernel in (None, "flex") and len(pattern.queries) > 1:  # a token that is generated has a small mask
            hindered = flex_attention.why_not(query, dropout)
            if not hindered:
                scale = self.softmax_scale
                found = flex_attention.attend_by_blocks(query, key, value, pattern, window, scale)
                if found is not None:
                    return found
            elif self.kernel == "flex":
                raise ValueError(f"Kernels(attention='flex'): {hindered}. Leave attention out.")
        # A token that is generated has a small mask on a GPU; kernels that take no mask refuse, whatever the data.
        in_one = len(pattern.queries) == 1 or self.kernel in sdpa.MASKLESS
        if pattern.length > JOINED and (query.device.type == "cpu" or not in_one):
            return attend_in_pieces(query, key, value, pattern, window, self._sdpa(dropout))
        mask = pattern.dense(window, query.device)
        return self._masked(query, key, value, mask, None, False, dropout)

    def _masked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        causal: bool,
        dropout: float,
    ) -> torch.Tensor:
        """As ``forward``, ``[s, b, heads/tp, head]``."""
        causal = causal and mask is None and bias is None
        kernel = self._sdpa(dropout)
        # Rows that are further heads have their output laid out as the next layer takes it; one token's always is.
        if bias is not None or (mask is not None and mask.size(0) > 1) or query.size(0) == 1:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, head]
            return kernel(q, k, v, _added_to_scores(mask, bias), causal).permute(2, 0, 1, 3)
        q, k, v = (x.flatten(1, 2).transpose(0, 1)[None] for x in (query, key, value))  # [1, b · n, s, head]
        return kernel(q, k, v, _added_to_scores(mask, bias), causal)[0].transpose(0, 1).reshape(query.shape)

    def _sdpa(self, dropout: float) -> Kernel:
        backend = None if self.kernel == "flex" else self.kernel
        return functools.partial(sdpa.attend, dropout=dropout, scale=self.softmax_scale, backend=backend)


def use_kernel(chunks: Iterable[torch.nn.Module], kernel: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Have the attention of all layers computed by ``kernel``, a name of ``Kernels.attention``.

    Raises:
        ValueError: It cannot compute in ``dtype``.
    """
    if device.type == "cuda" and kernel in ("flash", "cudnn") and dtype == torch.float32:
        raise ValueError(
            f"Kernels(attention={kernel!r}) computes in bf16 and fp16, and this model in fp32. Use"
            " Trainer(precision='bf16-mixed'), or attention='efficient', or leave attention out."
        )
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TorchAttention):
                module.kernel = kernel


def pad_mask(
    mask: AttentionPattern | torch.Tensor | None, queries: int, keys: int
) -> AttentionPattern | torch.Tensor | None:
    """A mask for ``queries`` and ``keys`` more tokens at the end: no query looks at the new keys but new queries.

    Args:
        mask: ``[b, 1, s or 1, s]``, True where a query may not look; or a pattern; None stays None.
        queries: Tokens to add to the dimension of the queries, unless that is 1.
        keys: Tokens to add to the dimension of the keys.
    """
    if mask is None:
        return None
    if isinstance(mask, AttentionPattern):
        return mask.padded(keys)
    mask = F.pad(mask, (0, keys), value=True)
    return F.pad(mask, (0, 0, 0, queries), value=False) if mask.size(-2) > 1 else mask  # a softmax needs a key


def _pattern(params: Any) -> AttentionPattern | None:
    if params is None:
        return None
    if not isinstance(params, PatternParams):
        raise ValueError("TorchAttention takes no packed sequences of megatron-core's; give an AttentionPattern.")
    return params.pattern


def _added_to_scores(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """torch's ``attn_mask``: True where a query may look, or numbers where there is a bias."""
    if bias is None:
        return None if mask is None else ~mask
    return bias if mask is None else bias.masked_fill(mask, float("-inf"))
