"""The adapters: LightningModules that build a model, make its batches and compute its loss."""

from lightning_megatron.modules.auto import AutoModule
from lightning_megatron.modules.base import MegatronModule, on_all_stages
from lightning_megatron.modules.bert import BertModule
from lightning_megatron.modules.bert_config import BertConfig
from lightning_megatron.modules.gpt import GPTModule
from lightning_megatron.modules.gpt_config import GPTConfig
from lightning_megatron.modules.t5 import T5Module
from lightning_megatron.modules.t5_config import T5Config

__all__ = [
    "AutoModule",
    "BertConfig",
    "BertModule",
    "GPTConfig",
    "GPTModule",
    "MegatronModule",
    "T5Config",
    "T5Module",
    "on_all_stages",
]
