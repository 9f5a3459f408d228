"""``ModelChunk``: the base of a model of your own, of which each pipeline stage builds its part."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule as CoreModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from lightning_megatron.distributed.parameter_names import WholeModelNames, whole_name
from lightning_megatron.models.layers.transformer_block import transformer_block


class ModelChunk(WholeModelNames, CoreModule):
    """What a model chunk needs beside its layers: megatron-core's schedules, gradients and checkpoints ask for it.

    A subclass makes its layers in ``__init__`` and runs them in ``forward``, which is called with what ``get_batch``
    returned. Chunks before the last return hidden states ``[s, b, h]``, of which the next chunk finds its own in
    ``self.input_tensor``; the last returns what ``loss`` and ``predict_step`` are given, rows first.

    Args:
        config: Made by ``MegatronModule.transformer_config``.
        pre_process: Whether this is the first chunk, which is given the batch.
        post_process: Whether this is the last chunk, which gives the output.
        vp_stage: Number of the chunk on this pipeline stage under interleaving, else None.

    Attributes:
        input_tensor: Hidden states of the chunk before, ``[s, b, h]``, under sequence parallelism ``[s/tp, b, h]``.
    """

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(
        self,
        config: TransformerConfig,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.input_tensor: torch.Tensor | None = None

    def transformer_block(self, causal: bool = False) -> TransformerBlock:
        """The transformer layers of this chunk, with a final norm on the last one; called with ``[s, b, h]``.

        Args:
            causal: Whether a token looks only at itself and earlier tokens.

        Raises:
            ValueError: The configuration has experts, which these layers have not.
        """
        if self.config.num_moe_experts is not None:
            raise ValueError(
                f"{type(self).__name__}.transformer_block() has no experts. Build layers of your own for"
                " self.layer_numbers, with lightning_megatron.ExpertLayer(config) in place of the feed-forward layer."
            )
        return transformer_block(
            self.config,
            causal=causal,
            post_process=self.post_process,
            vp_stage=self.vp_stage,
            fused_layers=getattr(self.config, "fused_layers", False),
        )

    @property
    def layer_numbers(self) -> range:
        """Which of the model's ``config.num_layers`` this chunk builds, from 1.

        Layers of your own go into a ``torch.nn.ModuleList`` whose name is, or ends with, ``layers``, each with its
        number as ``layer_number``; so a weight has one name under every layout.
        """
        before = get_transformer_layer_offset(self.config, self.vp_stage)
        return range(before + 1, before + 1 + get_num_layers_to_build(self.config, self.vp_stage))

    def split_sequence(self, hidden: torch.Tensor) -> torch.Tensor:
        """Under sequence parallelism this rank's part ``[s/tp, b, h]`` of ``[s, b, h]``, else the same."""
        return scatter_to_sequence_parallel_region(hidden) if self.config.sequence_parallel else hidden

    def join_sequence(self, hidden: torch.Tensor) -> torch.Tensor:
        """The reverse of ``split_sequence``, for layers that all tensor-parallel ranks compute alike: a head."""
        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the chunk before; the schedules call it."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of the weights, under the whole model's names; checkpoints ask for it."""
        found: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, entry in found.items():
            if entry.key == name:  # the layers of a TransformerBlock know their numbers themselves
                entry.key = prefix + whole_name(self, name.removeprefix(prefix))
        return found
