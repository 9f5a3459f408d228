"""Text from a model whose layers are shared out over ranks: transformers' loop over megatron-core's cached passes."""

from lightning_megatron.models.generation.custom_processors import Hooks, PrefixAllowedTokens
from lightning_megatron.models.generation.decoder import Decoder
from lightning_megatron.models.generation.eval_mode import prepared_to_generate
from lightning_megatron.models.generation.pipeline import Stages
from lightning_megatron.models.generation.prompts import Prompts, agree
from lightning_megatron.models.generation.settings import EarlyStopping, GenerationSettings

__all__ = [
    "Decoder",
    "EarlyStopping",
    "GenerationSettings",
    "Hooks",
    "PrefixAllowedTokens",
    "Prompts",
    "Stages",
    "agree",
    "prepared_to_generate",
]
