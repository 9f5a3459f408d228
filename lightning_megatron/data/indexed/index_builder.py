"""Makes megatron-core's datasets from a plain description; run as a script, it builds their indices.

megatron-core builds indices only on rank 0 of a process group, while the other ranks wait at a barrier: a second
machine without a shared folder finds none, and a script without a process group cannot build them at all. So this file
runs as a script on each machine, in a world of one rank. It imports neither Lightning nor this package, because that
would take longer than building most indices.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.masked_dataset import MaskedWordPieceDataset
from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset, T5MaskedWordPieceDatasetConfig

# The id that pads short samples. No token has it: a tokenizer's own padding id may also be its end of document, which
# would then be taken for padding.
PAD = -1


class _OneEpochWithoutSize(MaskedWordPieceDataset):
    """Has each sample once if no size is given. megatron-core 0.16 hands None to its C++ helper then, which fails."""

    num_samples: int | None

    def _build_sample_index(self, sequence_length: int, min_sentences_per_sample: int) -> Any:
        found = os.listdir(self.config.path_to_cache)
        if self.num_samples is None and not any(name.startswith(self.unique_description_hash) for name in found):
            self.num_samples = self._count(sequence_length, min_sentences_per_sample)
        return super()._build_sample_index(sequence_length, min_sentences_per_sample)

    def _count(self, sequence_length: int, min_sentences_per_sample: int) -> int:
        from megatron.core.datasets import (
            helpers,
        )  # the compiled helper is imported only here, so that everything else works without it

        mapping = helpers.build_mapping(
            self.dataset.document_indices[np.append(self.indices, self.indices[-1] + 1)],
            self.dataset.sequence_lengths,
            1,  # number of passes through the data
            np.iinfo(np.int64).max,
            sequence_length,
            self.config.short_sequence_probability,
            self.config.random_seed,
            False,
            min_sentences_per_sample,
        )
        return len(mapping)


class BertDataset(_OneEpochWithoutSize, BERTMaskedWordPieceDataset):
    """megatron-core's dataset for BERT, with or without a size."""


class T5Dataset(_OneEpochWithoutSize, T5MaskedWordPieceDataset):
    """megatron-core's dataset for T5, with or without a size."""


# The classes of dataset and configuration for each kind in a description.
DATASETS: dict[str, tuple[Any, Any]] = {
    "gpt": (GPTDataset, GPTDatasetConfig),
    "bert": (BertDataset, BERTMaskedWordPieceDatasetConfig),
    "t5": (T5Dataset, T5MaskedWordPieceDatasetConfig),
}


def dataset(description: dict[str, Any], cache: str) -> Any:
    """Make the dataset of one part of a split.

    Args:
        description: Plain data: ``kind``, ``paths``, ``weights``, ``split``, ``part`` (0 to 2), ``samples``,
            ``seed``, ``seq_length``, ``tokenizer`` and ``options``.
        cache: The folder of the indices. Indices that are there are read, others are built.

    Returns:
        megatron-core's dataset, with at least ``samples`` samples; without ``samples``, each sample of the data once.
    """
    cls, config_class = DATASETS[description["kind"]]
    part, samples = description["part"], description["samples"]
    config = config_class(
        random_seed=description["seed"],
        sequence_length=description["seq_length"],
        blend=(description["paths"], description["weights"]),
        split=description["split"],
        path_to_cache=cache,
        tokenizer=_tokenizer(description["tokenizer"]),
        **description["options"],
    )
    config.split_matrix = [bounds if i == part else None for i, bounds in enumerate(config.split_matrix)]
    sizes = [samples if i == part else (None if samples is None else 0) for i in range(3)]
    return BlendedMegatronDatasetBuilder(cls, sizes, lambda: True, config).build()[part]


def _tokenizer(fields: dict[str, Any]) -> SimpleNamespace:
    """The attributes of a tokenizer that megatron-core's datasets read; the cache's name contains ``identity`` only."""
    fields = dict(fields)
    if "tokens" in fields:
        fields["inv_vocab"] = dict(fields.pop("tokens"))
    return SimpleNamespace(pad=PAD, unique_identifiers={"identity": fields["identity"]}, **fields)


def _build() -> None:
    """Build indices for the pairs of a description and a folder that come on standard input."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for description, cache in json.load(sys.stdin):
        dataset(description, cache)
    dist.destroy_process_group()


if __name__ == "__main__":
    _build()
