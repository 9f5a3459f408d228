"""Datasets, tokenizers, collators and data modules.

Imports ``distributed``, but only what words the errors.
"""

from lightning_megatron.data.chat.datamodule import ChatDataModule
from lightning_megatron.data.collators.masked_lm import MaskedLMCollator
from lightning_megatron.data.collators.sentence_pairs import SentencePairCollator
from lightning_megatron.data.collators.span_corruption import SpanCorruptionCollator
from lightning_megatron.data.huggingface.datamodule import HFDataModule
from lightning_megatron.data.indexed.batch_size_rampup import BatchSizes, BatchSizeSteps, RampUp, RampUpBatches
from lightning_megatron.data.indexed.datamodule import MegatronDataModule
from lightning_megatron.data.indexed.files import IndexedDataError
from lightning_megatron.data.indexed.samples import BertSamples, GPTSamples, IndexedSamples, T5Samples
from lightning_megatron.data.text.datamodule import TextDataModule
from lightning_megatron.data.text.packing import PackedTextDataset
from lightning_megatron.data.text_files import standard_library_sources
from lightning_megatron.data.tokenizers import ByteTokenizer

__all__ = [
    "BatchSizeSteps",
    "BatchSizes",
    "BertSamples",
    "ByteTokenizer",
    "ChatDataModule",
    "GPTSamples",
    "HFDataModule",
    "IndexedDataError",
    "IndexedSamples",
    "MaskedLMCollator",
    "MegatronDataModule",
    "PackedTextDataset",
    "RampUp",
    "RampUpBatches",
    "SentencePairCollator",
    "SpanCorruptionCollator",
    "T5Samples",
    "TextDataModule",
    "standard_library_sources",
]
