"""Datasets and data modules that feed Megatron models."""

from lightning_megatron.data.hf_datamodule import HFDataModule
from lightning_megatron.data.masking import MaskedLMCollator
from lightning_megatron.data.packed_text import PackedTextDataset
from lightning_megatron.data.text_datamodule import TextDataModule
from lightning_megatron.data.text_sources import standard_library_sources
from lightning_megatron.data.text_tokenizer import ByteTokenizer

__all__ = [
    "ByteTokenizer",
    "HFDataModule",
    "MaskedLMCollator",
    "PackedTextDataset",
    "TextDataModule",
    "standard_library_sources",
]
