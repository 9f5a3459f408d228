"""The layer spec of a BERT's transformer block, with norms after or before the blocks, and its embedding."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from lightning_megatron.models.bert.config import NormPlacement
from lightning_megatron.models.layers.attention import TorchAttention
from lightning_megatron.models.layers.fused.layer_spec import fuse
from lightning_megatron.models.layers.fused.residual import AddingNorm, FusedNorm
from lightning_megatron.models.layers.norm import TorchNorm
from lightning_megatron.models.layers.recomputation import recomputes, use_recomputed_mlp


class NormedBiasDropoutAdd(torch.nn.Module):
    """megatron-core's bias, dropout and residual sum, and a norm of the result: post-LayerNorm.

    Args:
        config: Megatron's transformer configuration.
        norm: Makes the norm.
    """

    def __init__(self, config: TransformerConfig, norm: type[TorchNorm] = TorchNorm) -> None:
        super().__init__()
        self.layer_norm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The function that a transformer layer calls with (output and bias, residual, probability)."""
        if isinstance(self.layer_norm, AddingNorm):
            return lambda added, residual, p: self.layer_norm(residual, added, p)[1]
        add = get_bias_dropout_add(training, fused)
        return lambda *args: self.layer_norm(add(*args))  # [s/tp, b, h]


class NormedEmbedding(LanguageModelEmbedding):
    """The sum of word, position and token-type embeddings, normalised before its dropout."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.layer_norm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        # Dropout comes last, on this rank's part of the sequence.
        self.embedding_dropout.register_forward_pre_hook(self._normalise)

    def _normalise(self, _: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        return self.layer_norm(args[0])  # [s/tp, b, h]


def bert_embedding(placement: NormPlacement) -> type[LanguageModelEmbedding]:
    """The class of the embedding."""
    return LanguageModelEmbedding if placement == "pre" else NormedEmbedding


def bert_block_spec(
    config: TransformerConfig,
    placement: NormPlacement,
    vp_stage: int | None,
    fused_layers: bool = False,
    rotates: bool = False,
) -> TransformerBlockSubmodules:
    """The block for the layers of this pipeline stage (and virtual stage).

    Args:
        config: Megatron's transformer configuration.
        placement: As ``BertConfig`` has it.
        vp_stage: Number of the chunk on this pipeline stage under interleaving, else None.
        fused_layers: Whether operations between matrix products are joined.
        rotates: Whether that includes rotary positions.
    """
    layer = deepcopy(bert_layer_local_spec)
    parts = layer.submodules
    parts.self_attention.submodules.core_attention = TorchAttention
    use_recomputed_mlp(layer, config)
    parts.sharded_state_dict_keys_map = {}  # megatron-core's renames fuse norms into linears, as TE does
    norm = FusedNorm if fused_layers and not recomputes(config, "norm_output") else TorchNorm
    if placement == "post":
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        parts.self_attn_bda = parts.mlp_bda = ModuleSpec(
            module=NormedBiasDropoutAdd, params={"config": config, "norm": norm}
        )
    else:
        parts.input_layernorm = parts.pre_mlp_layernorm = TorchNorm
    if fused_layers:
        fuse(layer, rotates)
    layers = [layer] * config.num_layers
    if placement == "embedding_pre":
        layers[0] = deepcopy(layer)
        layers[0].submodules.input_layernorm = IdentityOp
    count, before = get_num_layers_to_build(config, vp_stage), get_transformer_layer_offset(config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=layers[before : before + count], layer_norm=None if placement == "post" else TorchNorm
    )
