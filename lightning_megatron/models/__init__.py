"""The LightningModules that build a model, make its batches and compute its loss: a folder for each family.

Imports ``distributed``, ``training``, ``data``, ``checkpoint`` and ``hf``.
"""

from typing import TYPE_CHECKING

from lightning_megatron.distributed.first_use import import_at_first_use

if TYPE_CHECKING:
    from lightning_megatron.models.auto import AutoModule
    from lightning_megatron.models.bert.config import BertConfig
    from lightning_megatron.models.bert.module import BertModule
    from lightning_megatron.models.gpt.config import GPTConfig
    from lightning_megatron.models.gpt.experts.config import Experts
    from lightning_megatron.models.gpt.experts.expert_layer import ExpertLayer
    from lightning_megatron.models.gpt.latent.config import LatentAttention
    from lightning_megatron.models.gpt.module import GPTModule
    from lightning_megatron.models.kernels import Kernels
    from lightning_megatron.models.megatron_module import MegatronModule, on_all_stages
    from lightning_megatron.models.model_chunk import ModelChunk
    from lightning_megatron.models.t5.config import T5Config
    from lightning_megatron.models.t5.module import T5Module

__all__ = [
    "AutoModule",
    "BertConfig",
    "BertModule",
    "ExpertLayer",
    "Experts",
    "GPTConfig",
    "GPTModule",
    "Kernels",
    "LatentAttention",
    "MegatronModule",
    "ModelChunk",
    "T5Config",
    "T5Module",
    "on_all_stages",
]

__getattr__ = import_at_first_use(
    __name__,
    {
        "auto": ["AutoModule"],
        "bert.config": ["BertConfig"],
        "bert.module": ["BertModule"],
        "gpt.config": ["GPTConfig"],
        "gpt.experts.config": ["Experts"],
        "gpt.experts.expert_layer": ["ExpertLayer"],
        "gpt.latent.config": ["LatentAttention"],
        "gpt.module": ["GPTModule"],
        "kernels": ["Kernels"],
        "megatron_module": ["MegatronModule", "on_all_stages"],
        "model_chunk": ["ModelChunk"],
        "t5.config": ["T5Config"],
        "t5.module": ["T5Module"],
    },
)
