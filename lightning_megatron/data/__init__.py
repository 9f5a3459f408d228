"""Datasets, tokenizers, collators and data modules.

Imports ``distributed``, but only what words the errors.
"""

from typing import TYPE_CHECKING

from lightning_megatron.distributed.first_use import import_at_first_use

if TYPE_CHECKING:
    from lightning_megatron.data.chat.datamodule import ChatDataModule
    from lightning_megatron.data.collators.masked_lm import MaskedLMCollator
    from lightning_megatron.data.collators.sentence_pairs import SentencePairCollator
    from lightning_megatron.data.collators.span_corruption import SpanCorruptionCollator
    from lightning_megatron.data.huggingface.datamodule import HFDataModule
    from lightning_megatron.data.indexed.batch_size_rampup import BatchSizes, BatchSizeSteps, RampUp
    from lightning_megatron.data.indexed.datamodule import MegatronDataModule
    from lightning_megatron.data.indexed.files import IndexedDataError
    from lightning_megatron.data.indexed.growing_batches import RampUpBatches
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

__getattr__ = import_at_first_use(
    __name__,
    {
        "chat.datamodule": ["ChatDataModule"],
        "collators.masked_lm": ["MaskedLMCollator"],
        "collators.sentence_pairs": ["SentencePairCollator"],
        "collators.span_corruption": ["SpanCorruptionCollator"],
        "huggingface.datamodule": ["HFDataModule"],
        "indexed.batch_size_rampup": ["BatchSizes", "BatchSizeSteps", "RampUp"],
        "indexed.datamodule": ["MegatronDataModule"],
        "indexed.growing_batches": ["RampUpBatches"],
        "indexed.files": ["IndexedDataError"],
        "indexed.samples": ["BertSamples", "GPTSamples", "IndexedSamples", "T5Samples"],
        "text.datamodule": ["TextDataModule"],
        "text.packing": ["PackedTextDataset"],
        "text_files": ["standard_library_sources"],
        "tokenizers": ["ByteTokenizer"],
    },
)
