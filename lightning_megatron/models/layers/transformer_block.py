"""megatron-core's transformer block with norms and attention of torch, which need neither Apex nor other kernels."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from lightning_megatron.models.layers.attention import TorchAttention
from lightning_megatron.models.layers.fused.layer_spec import fuse
from lightning_megatron.models.layers.norm import TorchNorm
from lightning_megatron.models.layers.recomputation import use_recomputed_mlp


def torch_layer_spec(config: TransformerConfig, causal: bool = True) -> ModuleSpec:
    """A layer of self-attention and a feed-forward layer, with a norm before each.

    Args:
        config: Megatron's transformer configuration.
        causal: Whether a token looks only at itself and earlier tokens.
    """
    layer = get_gpt_layer_local_spec(
        normalization=config.normalization, qk_layernorm=config.qk_layernorm, qk_l2_norm=config.qk_l2_norm
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = TorchNorm
    attention = parts.self_attention
    attention.params = {"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.padding}
    attention.submodules.core_attention = TorchAttention
    if config.qk_layernorm and not config.qk_l2_norm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = TorchNorm
    use_recomputed_mlp(layer, config)
    parts.sharded_state_dict_keys_map = {}  # megatron-core's renames fuse norms into linears, as TE does
    return layer


def transformer_block(
    config: TransformerConfig, *, causal: bool, post_process: bool, vp_stage: int | None, fused_layers: bool
) -> TransformerBlock:
    """The layers of a model chunk, and on the last one the norm behind them.

    Args:
        config: Megatron's transformer configuration.
        causal: Whether a token looks only at itself and earlier tokens.
        post_process: Whether this is the model's last chunk.
        vp_stage: Number of the chunk on this pipeline stage under interleaving, else None.
        fused_layers: Whether operations between matrix products are joined.
    """
    layer = torch_layer_spec(config, causal)
    if fused_layers:
        fuse(layer)
    spec = TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=TorchNorm
    )
    # It is given the hidden states of the stage before, so it need not hold them itself, as without `pre_process`.
    return TransformerBlock(config, spec, pre_process=True, post_process=post_process, vp_stage=vp_stage)
