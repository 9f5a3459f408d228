"""Models of transformers, in and out: a family's names in one file, and one way for all of them to be read and written.

``pieces.py`` says which of their rows make one of our tensors; ``fields.py`` reads their configuration and names what
nobody read; ``blueprint.py`` knows what transformers' own model reads, and its names; ``source.py`` reads rectangles
of their tensors; ``loading.py`` fills a rank's shards; ``origin.py`` keeps what came with them; ``whole.py`` and
``saving.py`` write a directory, which ``target.py`` describes. ``families/`` has a file for each architecture.
"""

from lightning_megatron.hf import families  # they register themselves
from lightning_megatron.hf.family import Family, family_for, family_of, kind_of, known_families
from lightning_megatron.hf.fields import Fields, UnsupportedConfigError
from lightning_megatron.hf.loading import Pretrained, WeightsError, fill
from lightning_megatron.hf.origin import Origin
from lightning_megatron.hf.source import Source, open_source
from lightning_megatron.hf.target import Target

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
]
