"""Self-attention that caches keys after their rotation."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention


class RotatesOnce(SelfAttention):
    """megatron-core's, but that each key is rotated when it is new; there all are again, for each token written."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if inference_context is not None and rotary_pos_emb is not None:
            angles = rotary_pos_emb[1]
            first = inference_context.sequence_len_offset
            here = angles[first : first + key.size(0)]
            key = apply_rotary_pos_emb(key, here, config=self.config, cp_group=self.pg_collection.cp)
        query, key, value, rotary, *rest = super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )
        if inference_context is not None and rotary is not None:
            rotary = (rotary[0], None)
        return query, key, value, rotary, *rest
