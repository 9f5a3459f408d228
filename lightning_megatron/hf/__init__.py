"""Models of transformers, in and out: a family's names in one file, one way to read and write all of them.

``weight_mapping.py`` says which rows of their tensors make one of ours. ``config_reader.py`` reads their configuration
and names the fields that nobody read. ``meta_model.py`` knows what transformers' own model reads, and its tensors'
names. ``weight_source.py`` reads slices of their tensors, and ``load_pretrained.py`` fills a rank's shards with them.
``original_settings.py`` keeps what came beside the weights. ``gather.py`` and ``pretrained_directory.py`` write a
directory, which ``export.py`` describes. ``families/`` has a file for each architecture.

Imports ``distributed`` and ``checkpoint``.
"""

from lightning_megatron.hf import families  # they register themselves
from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError
from lightning_megatron.hf.export import Target
from lightning_megatron.hf.family import Family, family_for, family_of, kind_of, known_families
from lightning_megatron.hf.load_pretrained import Pretrained, WeightsError, fill
from lightning_megatron.hf.original_settings import Origin
from lightning_megatron.hf.weight_source import Source, open_source, without_weights

__all__ = [
    "Family",
    "Fields",
    "Origin",
    "Pretrained",
    "Source",
    "Target",
    "UnsupportedConfigError",
    "WeightsError",
    "families",
    "family_for",
    "family_of",
    "fill",
    "kind_of",
    "known_families",
    "open_source",
    "without_weights",
]
