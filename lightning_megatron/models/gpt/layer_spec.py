"""The layer spec of a GPT's transformer block on one pipeline stage."""

from __future__ import annotations

from copy import deepcopy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import is_te_min_version

from lightning_megatron.models.generation.cached_layers import generate_quickly
from lightning_megatron.models.gpt.config import GPTConfig
from lightning_megatron.models.gpt.experts.expert_layer import ExpertLayer
from lightning_megatron.models.gpt.latent.latent_self_attention import use_latent_attention
from lightning_megatron.models.gpt.parallel_residual import ParallelResidualLayer
from lightning_megatron.models.layers.fused.layer_spec import fuse
from lightning_megatron.models.layers.joint_norm import JointKeyNorm, JointNorm
from lightning_megatron.models.layers.norm import TorchNorm
from lightning_megatron.models.layers.output_norm import without_input_norms
from lightning_megatron.models.layers.transformer_block import torch_layer_spec


def gpt_block_spec(
    config: TransformerConfig,
    shape: GPTConfig,
    vp_stage: int | None,
    fused_layers: bool = False,
    rotates: bool = False,
) -> TransformerBlockSubmodules | ModuleSpec:
    """The block of the layers on this pipeline stage (and virtual stage).

    Args:
        config: Megatron's transformer configuration.
        shape: The model's shape: whose layers they are, and where their norms and residual sums are.
        vp_stage: Number of the chunk on this pipeline stage under interleaving, else None.
        fused_layers: Whether operations between matrix products are joined, of ``layers="torch"``.
        rotates: Whether that includes rotary positions.
    """
    if shape.layers == "transformer_engine":
        return _transformer_engine_block(config)
    layers = _layer_specs(config, shape, fused_layers, rotates)
    count, before = get_num_layers_to_build(config, vp_stage), get_transformer_layer_offset(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers[before : before + count], layer_norm=TorchNorm)


def last_layer_spec(
    config: TransformerConfig, shape: GPTConfig, fused_layers: bool = False, rotates: bool = False
) -> ModuleSpec:
    """The model's last layer, as those of multi-token prediction are; arguments as of ``gpt_block_spec``."""
    return _layer_specs(config, shape, fused_layers, rotates)[-1]


def _layer_specs(config: TransformerConfig, shape: GPTConfig, fused_layers: bool, rotates: bool) -> list[ModuleSpec]:
    """Those of all layers of the model."""
    layer = torch_layer_spec(config)
    generate_quickly(layer)
    parts = layer.submodules
    if shape.latent_attention is not None:
        use_latent_attention(layer)
    if shape.norm_placement == "output":
        without_input_norms(layer)
    if shape.joint_qk_norm:
        heads = parts.self_attention.submodules
        heads.q_layernorm, heads.k_layernorm = JointNorm, JointKeyNorm
    with_experts = deepcopy(layer)  # parts of a spec are changed later, and each but once
    with_experts.submodules.mlp = ExpertLayer
    for each in (layer, with_experts) if fused_layers else ():
        fuse(each, rotates)
    if shape.parallel_residual:
        layer.module = ParallelResidualLayer
    if shape.shared_norm:
        parts.pre_mlp_layernorm = IdentityOp
    has_experts = [False] * config.num_layers if config.num_moe_experts is None else config.moe_layer_freq
    return [with_experts if has else layer for has in has_experts]


def _transformer_engine_block(config: TransformerConfig) -> ModuleSpec:
    try:
        is_te_min_version("1.0.0")
        import transformer_engine  # noqa: F401
    except Exception as error:
        raise ImportError(
            "GPTConfig(layers='transformer_engine') needs Transformer Engine, which could not be imported here"
            f" ({error}). Install it (pip install 'transformer-engine[pytorch]') or use layers='torch'."
        ) from error
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
