"""Multi-token prediction: layers behind the model that predict the tokens after the next one, as a second loss.

The layer of depth ``k`` joins the hidden state of each token with the embedding of the token ``k`` places on, and the
output layer predicts the token after that from what it makes of them (DeepSeek-V3's report, 2024, section 2.2).
megatron-core's own layers differ between its releases, their losses are means over a micro-batch, and each rank shifts
its part of the tokens. Here whole rows are shifted, before ranks share them out, and losses are weighed as those of the
text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig, build_module
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from typing_extensions import override

from lightning_megatron.models.layers.attention_pattern import AttentionPattern
from lightning_megatron.models.layers.chunked_cross_entropy import WeightedLabels
from lightning_megatron.models.layers.norm import TorchNorm


class LaterTokens(NamedTuple):
    """What the layers of multi-token prediction are given of one micro-batch; ``n`` is their number.

    Args:
        ids: ``[n, b, s]``, for each token the one that is 1, 2, ... places on; behind the row's end, 0.
        labels: ``[n, b, s]``, the token that follows that one.
        weights: ``[n, b, s]``, what predicting it counts in the loss.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def depths(self) -> Iterator[tuple[torch.Tensor, WeightedLabels]]:
        """For each layer its tokens, and its labels, all ``[b, s]``."""
        for ids, labels, weights in zip(self.ids, self.labels, self.weights, strict=True):
            yield ids, WeightedLabels(labels, weights)


def later_tokens(inputs: dict[str, Any], depths: int) -> LaterTokens:
    """Shift the tokens, labels and weights of whole rows.

    A prediction counts if that of the token before it does, and if no document lies between.

    Args:
        inputs: The model's inputs, of whole rows ``[b, s]``.
        depths: How many layers predict.
    """
    ids, labels, weights, mask = (inputs[name] for name in ("input_ids", "labels", "loss_mask", "attention_mask"))
    shifted = [
        (_from(ids, k), _from(labels, k), _from(weights, k) * _is_one_document(mask, ids.size(1), k, ids.device))
        for k in range(1, depths + 1)
    ]
    return LaterTokens(*(torch.stack(each) for each in zip(*shifted, strict=True)))


def _from(rows: torch.Tensor, places: int) -> torch.Tensor:
    """``rows`` ``[b, s]`` from that many places on, with zeros behind."""
    return F.pad(rows[:, places:], (0, min(places, rows.size(1))))


def _is_one_document(mask: Any, length: int, places: int, device: torch.device) -> torch.Tensor | float:
    """``[b or 1, s]``, whether a token is in one document with the one ``places`` on."""
    if isinstance(mask, AttentionPattern):
        if mask.documents is None:
            return 1.0
        same = mask.documents[:, places:] == mask.documents[:, :-places]
    elif mask is not None:  # [b, 1, s, s], True where a query may not look
        same = ~mask.diagonal(-places, -2, -1)[:, 0]
    else:
        return 1.0
    return F.pad(same.to(device), (0, min(places, length))).float()


class LaterTokenLayer(MegatronModule):
    """The layer of one depth, which is given the embeddings of the later tokens.

    Args:
        config: megatron-core's configuration.
        layer: The spec of the transformer layer in it.
        depth: Its number, from 1.
        vp_stage: Number of the chunk on this pipeline stage under interleaving, else None.

    Attributes:
        last_seen: The sum of its losses in the last window, over all ranks, and that of their weights.
    """

    last_seen: torch.Tensor | None = None
    _seen: torch.Tensor | None = None

    def __init__(self, config: TransformerConfig, layer: ModuleSpec, depth: int, vp_stage: int | None) -> None:
        super().__init__(config)
        self.layer_number = depth
        self.enorm, self.hnorm, self.final_layernorm = (
            TorchNorm(config, config.hidden_size, config.layernorm_epsilon) for _ in range(3)
        )
        self.eh_proj = ColumnParallelLinear(
            2 * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
        )
        number = config.num_layers + depth - get_transformer_layer_offset(config, vp_stage)  # which it adds itself
        self.transformer_layer = build_module(layer, config=config, layer_number=number, vp_stage=vp_stage)

    @override
    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor, **attention: Any) -> torch.Tensor:
        """Run the layer.

        Args:
            hidden: ``[s/tp, b, h]``, what the depth before it gave; of the first depth, the model.
            embedded: The embeddings of the later tokens, of the same shape.
            **attention: What the transformer layer takes of positions and masks.

        Returns:
            Hidden states for the output layer, and for the next depth.
        """

        def run(hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
            parallel = self.config.sequence_parallel
            with tensor_parallel.get_cuda_rng_tracker().fork() if parallel else nullcontext():  # as around a block
                output, _ = self.transformer_layer(hidden_states=self._joined(hidden, embedded), **attention)
            result: torch.Tensor = self.final_layernorm(output)
            return result

        if self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled():
            again: torch.Tensor = tensor_parallel.checkpoint(
                run, self.config.distribute_saved_activations, hidden, embedded
            )
            return again
        return run(hidden, embedded)

    def _joined(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """``[s/tp, b, h]`` of both, through one projection."""
        both = torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1)
        output = gather_from_tensor_model_parallel_region(self.eh_proj(both)[0])
        return scatter_to_sequence_parallel_region(output) if self.config.sequence_parallel else output

    # What training/window_counts.py asks at the end of a window

    def count(self, loss: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the summed loss of a micro-batch, and the weights ``[b, s]`` of its tokens."""
        seen = torch.stack([loss.detach().float(), weights.sum().float()])
        self._seen = seen if self._seen is None else self._seen + seen

    def window_counts(self) -> torch.Tensor:
        """What this rank has counted in the window; it counts anew from here."""
        seen = torch.zeros(2, device=self.eh_proj.weight.device) if self._seen is None else self._seen
        self._seen = None
        return seen

    def end_window(self, seen: torch.Tensor) -> None:
        """Keep what all ranks have counted."""
        self.last_seen = seen


class LaterTokenLayers(MegatronModule):
    """The layers of all depths.

    Args:
        config: megatron-core's configuration.
        layer: The spec of the transformer layer in each.
        depths: How many there are.
        vp_stage: Number of the chunk on this pipeline stage under interleaving, else None.
    """

    def __init__(self, config: TransformerConfig, layer: ModuleSpec, depths: int, vp_stage: int | None) -> None:
        super().__init__(config)
        numbers = range(1, depths + 1)
        self.layers = torch.nn.ModuleList(LaterTokenLayer(config, layer, number, vp_stage) for number in numbers)

    @override
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the weights of each layer to checkpoints."""
        found: dict[str, Any] = {}
        for number, layer in enumerate(self.layers):
            found |= layer.sharded_state_dict(f"{prefix}layers.{number}.", sharded_offsets, metadata)  # type: ignore[operator]
        return found


def loss_of_depths(
    layers: Any,
    hidden: torch.Tensor,
    later: LaterTokens,
    embed: Callable[[torch.Tensor], torch.Tensor],
    loss: Callable[[torch.Tensor, WeightedLabels], torch.Tensor],
    **attention: Any,
) -> torch.Tensor:
    """The mean over the depths of their summed losses, a scalar.

    Args:
        layers: The layers, one a depth.
        hidden: ``[s/tp, b, h]``, the model's output before its output layer.
        later: The later tokens.
        embed: Gives the embeddings ``[s/tp, b, h]`` of ids ``[b, s]``.
        loss: Gives the summed loss of hidden states for their labels.
        **attention: What the layers take of positions and masks.
    """
    losses = []
    for layer, (ids, labels) in zip(layers, later.depths(), strict=True):
        hidden = layer(hidden, embed(ids), **attention)
        losses.append(loss(hidden, labels))
        layer.count(losses[-1], labels.weights)
    return torch.stack(losses).mean()
