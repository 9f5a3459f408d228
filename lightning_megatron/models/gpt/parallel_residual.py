"""A transformer layer whose feed-forward layer is beside attention, not behind it; megatron-core has none."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor

from lightning_megatron.models.generation.cached_layers import CachedLayer


class ParallelResidualLayer(CachedLayer):
    """``x + attention(norm(x)) + feed_forward(other_norm(x))``, as in GPT-NeoX.

    Without a second norm in its spec both read the output of the first, as in Phi.
    """

    mlp_beside = True

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Run the layer on ``[s/tp, b, h]``."""
        if kwargs.get("inference_context") is not None:
            return super().forward(hidden_states, *args, **kwargs)
        kwargs.pop("dynamic_inference_decode_only", None)
        if self.shares_norm:
            normed = self.input_layernorm(hidden_states)
            added_first, context = self.self_attention(normed, *args, **_of_attention(kwargs)), None
            with self.bias_dropout_add_exec_handler():
                adding = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
                attended = adding(added_first, hidden_states, self.hidden_dropout)
        else:
            attended, context = self._forward_attention(hidden_states, *args, **kwargs)
            normed = self.pre_mlp_layernorm(hidden_states)
        output_and_bias = self.mlp(normed)
        with self.bias_dropout_add_exec_handler():
            added = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
            hidden = added(output_and_bias, attended, self.hidden_dropout)
        # The schedules free what one stage has sent, which a view would keep alive.
        return make_viewless_tensor(inp=hidden, requires_grad=hidden.requires_grad, keep_graph=True), context


def _of_attention(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer that its self-attention takes."""
    others = ("context", "context_mask", "padding_mask")
    return {name: value for name, value in arguments.items() if name not in others}
