"""A transformer layer whose residual sums and norms are computed together."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor

from lightning_megatron.models.layers.fused.residual import AddingNorm, fused_bias_dropout_add
from lightning_megatron.models.layers.recomputation import recomputes


class FusedLayer(TransformerLayer):
    """megatron-core's layer with norms before the blocks, each norm in one kernel with the sum before it.

    Where the output of a norm is recomputed or offloaded, and in generation, the layer runs as megatron-core's does.
    """

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """Run the layer on ``[s/tp, b, h]``, with the arguments of megatron-core's."""
        if not self._joins_norms or kwargs.get("inference_context") is not None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        kwargs.pop("dynamic_inference_decode_only", None)
        context, context_mask = kwargs.pop("context", None), kwargs.pop("context_mask", None)
        padding_mask = kwargs.pop("padding_mask", None)
        residual, normed = self.input_layernorm(hidden_states, p=0.0)
        added = self.self_attention(normed, attention_mask=attention_mask, **kwargs)
        if not isinstance(self.cross_attention, IdentityOp):
            residual, normed = self.pre_cross_attn_layernorm(residual, added, self.hidden_dropout)
            added = self.cross_attention(normed, attention_mask=context_mask, key_value_states=context)
        residual, normed = self.pre_mlp_layernorm(residual, added, self.hidden_dropout)
        added = self.mlp(normed, padding_mask=padding_mask)
        hidden = fused_bias_dropout_add(self.training, True)(added, residual, self.hidden_dropout)
        # The schedules free what one stage has sent, which a view would keep alive.
        return make_viewless_tensor(inp=hidden, requires_grad=hidden.requires_grad, keep_graph=True), context

    @property
    def _joins_norms(self) -> bool:
        """Whether nothing comes between a sum and its norm, or between a norm and its block."""
        norms = [self.input_layernorm, self.pre_mlp_layernorm]
        if not isinstance(self.cross_attention, IdentityOp):
            norms.append(self.pre_cross_attn_layernorm)
        apart = (
            self.recompute_input_layernorm,
            self.recompute_pre_mlp_layernorm,
            self.recompute_mlp,
            self.offload_attn_norm,
            self.offload_mlp_norm,
            recomputes(self.config, "norm_output"),
        )
        return not any(apart) and all(isinstance(norm, AddingNorm) for norm in norms)
