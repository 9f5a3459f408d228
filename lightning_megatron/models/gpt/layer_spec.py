"""The layer spec of a GPT's transformer block on one pipeline stage."""

from __future__ import annotations

from copy import deepcopy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import is_te_min_version

from lightning_megatron.models.generation.cached_layers import generate_quickly
from lightning_megatron.models.gpt.experts.expert_layer import ExpertLayer
from lightning_megatron.models.gpt.parallel_residual import ParallelResidualLayer
from lightning_megatron.models.layers.fused.layer_spec import fuse
from lightning_megatron.models.layers.norm import TorchNorm
from lightning_megatron.models.layers.transformer_block import torch_layer_spec
from lightning_megatron.models.model_config import LayerBackend


def gpt_block_spec(
    config: TransformerConfig,
    layers: LayerBackend,
    parallel_residual: bool,
    vp_stage: int | None,
    fused_layers: bool = False,
    rotates: bool = False,
) -> TransformerBlockSubmodules | ModuleSpec:
    """The block of the layers on this pipeline stage (and virtual stage).

    Args:
        config: Megatron's transformer configuration.
        layers: Whose layers they are.
        parallel_residual: Whether the feed-forward layer is beside attention.
        vp_stage: Number of the chunk on this pipeline stage under interleaving, else None.
        fused_layers: Whether operations between matrix products are joined, of ``layers="torch"``.
        rotates: Whether that includes rotary positions.
    """
    spec = _BLOCKS[layers](config, vp_stage)
    if fused_layers and layers == "torch":
        for layer in {id(layer): layer for layer in spec.layer_specs}.values():  # most layers share one
            fuse(layer, rotates)
    if parallel_residual:
        for layer in spec.layer_specs:
            layer.module = ParallelResidualLayer
    return spec


def _torch_block(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    layer = torch_layer_spec(config)
    generate_quickly(layer)
    with_experts = deepcopy(layer)  # parts of a spec are changed later, and each but once
    with_experts.submodules.mlp = ExpertLayer
    count, before = get_num_layers_to_build(config, vp_stage), get_transformer_layer_offset(config, vp_stage)
    has_experts = [False] * config.num_layers if config.num_moe_experts is None else config.moe_layer_freq
    specs = [with_experts if has else layer for has in has_experts[before : before + count]]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=TorchNorm)


def _transformer_engine_block(config: TransformerConfig, vp_stage: int | None) -> ModuleSpec:
    try:
        is_te_min_version("1.0.0")
        import transformer_engine  # noqa: F401
    except Exception as error:
        raise ImportError(
            "GPTConfig(layers='transformer_engine') needs Transformer Engine, which could not be imported here"
            f" ({error}). Install it (pip install 'transformer-engine[pytorch]') or use layers='torch'."
        ) from error
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)


_BLOCKS = {"torch": _torch_block, "transformer_engine": _transformer_engine_block}
