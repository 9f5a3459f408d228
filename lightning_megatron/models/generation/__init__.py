"""Text from a model whose layers are shared out over ranks: transformers' loop over megatron-core's cached passes."""

from lightning_megatron.generation.decoder import Decoder, GPTDecoder, T5Decoder
from lightning_megatron.generation.hooks import Hooks, PrefixAllowedTokens
from lightning_megatron.generation.loop import write
from lightning_megatron.generation.prompts import Prompts, agree
from lightning_megatron.generation.settings import EarlyStopping, GenerationSettings
from lightning_megatron.generation.stages import Stages
from lightning_megatron.generation.state import lent

__all__ = [
    "Decoder",
    "EarlyStopping",
    "GPTDecoder",
    "GenerationSettings",
    "Hooks",
    "PrefixAllowedTokens",
    "Prompts",
    "Stages",
    "T5Decoder",
    "agree",
    "lent",
    "write",
]
