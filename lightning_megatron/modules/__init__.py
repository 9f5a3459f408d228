"""The adapters: LightningModules that build a model, make its batches and compute its loss."""

from lightning_megatron.modules.base import MegatronModule
from lightning_megatron.modules.bert import BertModule
from lightning_megatron.modules.bert_config import BertConfig
from lightning_megatron.modules.gpt import GPTModule
from lightning_megatron.modules.gpt_config import GPTConfig

__all__ = ["BertConfig", "BertModule", "GPTConfig", "GPTModule", "MegatronModule"]
