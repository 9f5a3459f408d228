"""Layer specs for megatron-core's models: plain PyTorch, or Transformer Engine where it is installed and asked for."""

from lightning_megatron.layers.bert import NormPlacement
from lightning_megatron.layers.gpt import LayerKind, gpt_block_spec
from lightning_megatron.layers.gpt_model import PositionedGPT
from lightning_megatron.layers.multiplier import scale_output
from lightning_megatron.layers.rotary import ROPE_TYPES, move_rotary, stretch_rotary
from lightning_megatron.layers.vocabulary import cross_entropy_over_shards, mask_padded_vocabulary

__all__ = [
    "ROPE_TYPES",
    "LayerKind",
    "NormPlacement",
    "PositionedGPT",
    "cross_entropy_over_shards",
    "gpt_block_spec",
    "mask_padded_vocabulary",
    "move_rotary",
    "scale_output",
    "stretch_rotary",
]
