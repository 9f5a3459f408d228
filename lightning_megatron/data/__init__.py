"""Datasets and data modules that feed Megatron models."""

from lightning_megatron.data.hf_datamodule import HFDataModule
from lightning_megatron.data.indexed import IndexedDataError
from lightning_megatron.data.indexed_samples import BertSamples, GPTSamples, IndexedSamples, T5Samples
from lightning_megatron.data.masking import MaskedLMCollator
from lightning_megatron.data.megatron_datamodule import MegatronDataModule
from lightning_megatron.data.packed_text import PackedTextDataset
from lightning_megatron.data.ramp_up import BatchSizes, BatchSizeSteps, RampUp, RampUpBatches
from lightning_megatron.data.sentence_pairs import SentencePairCollator
from lightning_megatron.data.span_corruption import SpanCorruptionCollator
from lightning_megatron.data.text_datamodule import TextDataModule
from lightning_megatron.data.text_sources import standard_library_sources
from lightning_megatron.data.text_tokenizer import ByteTokenizer

__all__ = [
    "BatchSizeSteps",
    "BatchSizes",
    "BertSamples",
    "ByteTokenizer",
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
