"""megatron-core's datasets from a plain description, and the process of their own in which their indices are built.

megatron-core builds indices on rank 0 of a process group only, while the other ranks wait at a barrier: a second
machine without a shared folder finds none, and a script without a process group cannot build them at all. So they are
built by this file, run as a script: a world of one rank, on each machine. It imports neither Lightning nor this
package, which would take longer than most indices do.
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

# Pads what is shorter than a sample. No token has this id, so that padding is never taken for a token, nor a token for
# padding, as it is where a tokenizer ends documents with its padding.
PAD = -1


class _OneEpochWithoutSize(MaskedWordPieceDataset):
    """Each sample once where no size is given: megatron-core 0.16's own way to do so hands None to C++, and fails."""

    num_samples: int | None

    def _build_sample_index(self, sequence_length: int, min_sentences_per_sample: int) -> Any:
        found = os.listdir(self.config.path_to_cache)
        if self.num_samples is None and not any(name.startswith(self.unique_description_hash) for name in found):
            self.num_samples = self._count(sequence_length, min_sentences_per_sample)
        return super()._build_sample_index(sequence_length, min_sentences_per_sample)

    def _count(self, sequence_length: int, min_sentences_per_sample: int) -> int:
        from megatron.core.datasets import helpers  # compiled, and only here: without it all else works

        mapping = helpers.build_mapping(
            self.dataset.document_indices[np.append(self.indices, self.indices[-1] + 1)],
            self.dataset.sequence_lengths,
            1,  # pass through the data
            np.iinfo(np.int64).max,
            sequence_length,
            self.config.short_sequence_probability,
            self.config.random_seed,
            False,
            min_sentences_per_sample,
        )
        return len(mapping)


class BertDataset(_OneEpochWithoutSize, BERTMaskedWordPieceDataset):
    """megatron-core's, with or without a size."""


class T5Dataset(_OneEpochWithoutSize, T5MaskedWordPieceDataset):
    """megatron-core's, with or without a size."""


# What a description may ask for.
DATASETS: dict[str, tuple[Any, Any]] = {
    "gpt": (GPTDataset, GPTDatasetConfig),
    "bert": (BertDataset, BERTMaskedWordPieceDatasetConfig),
    "t5": (T5Dataset, T5MaskedWordPieceDatasetConfig),
}


def dataset(description: dict[str, Any], cache: str) -> Any:
    """One split's dataset.

    Args:
        description: ``kind``, ``paths``, ``weights``, ``split``, ``part`` (which of the three), ``samples``, ``seed``,
            ``seq_length``, ``tokenizer`` and ``options``; plain data.
        cache: A folder for the indices. Where they are there, they are read.

    Returns:
        megatron-core's dataset, which has ``samples`` samples or more; or all of its data once.
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
    """What megatron-core's datasets ask of a tokenizer; ``identity`` stands for all of it in a cache's name."""
    fields = dict(fields)
    if "tokens" in fields:
        fields["inv_vocab"] = dict(fields.pop("tokens"))
    return SimpleNamespace(pad=PAD, unique_identifiers={"identity": fields["identity"]}, **fields)


def _build() -> None:
    """Build the indices that standard input asks for: pairs of a description and a folder."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for description, cache in json.load(sys.stdin):
        dataset(description, cache)
    dist.destroy_process_group()


if __name__ == "__main__":
    _build()
