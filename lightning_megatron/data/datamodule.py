"""The base of this package's data modules: three parts of the data, a tokenizer, and evaluation in order."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_megatron.data.tokenizers import Tokenizer, load_tokenizer

PARTS = ("train", "val", "test")

# The parts that each stage of the Trainer uses, the indispensable one first. The key None is `setup()` called by hand.
USED = {None: PARTS, "fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}

Loader = DataLoader[Any]
Collator = Callable[[list[Any]], Any]


class TokenizedDataModule(LightningDataModule):
    """A data module over token ids; prediction runs over the test part.

    Args:
        tokenizer: ``"bytes"``, the path of a ``tokenizer.json``, a transformers folder or hub name, or a tokenizer.
    """

    def __init__(self, tokenizer: str | Path | Tokenizer) -> None:
        super().__init__()
        self._tokenizer_source = tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which is loaded, and if necessary downloaded, at its first use."""
        return load_tokenizer(self._tokenizer_source)

    @property
    def vocab_size(self) -> int:
        """The model's ``vocab_size``: one more than the largest id in a batch."""
        return self.tokenizer.vocab_size

    @override
    def val_dataloader(self) -> Loader | list[Loader]:
        """Returns the validation batches, in order; an empty list, which Lightning skips, where there are none."""
        return self._ordered("val")

    @override
    def test_dataloader(self) -> Loader | list[Loader]:
        """Returns the test batches, in order; an empty list where there are none."""
        return self._ordered("test")

    @override
    def predict_dataloader(self) -> Loader | list[Loader]:
        """Returns the test batches, as :meth:`test_dataloader` does."""
        return self._ordered("test")

    @abstractmethod
    def _ordered(self, part: str) -> Loader | list[Loader]:
        """The batches of a part in order; Lightning shares them out over the data-parallel ranks."""

    def _sampler(
        self, samples: Dataset[Any], batch_size: int, shuffle: bool, seed: int, drop_last: bool
    ) -> DistributedSampler[Any]:
        """Make the sampler of this data-parallel rank's training samples.

        Lightning would inject one only under a distributed strategy, with the seed of ``seed_everything``. It keeps a
        ``DistributedSampler`` that a loader already has, and sets its epoch.

        Raises:
            ValueError: ``drop_last`` leaves no batch.
        """
        sampler: DistributedSampler[Any] = DistributedSampler(
            samples, shuffle=shuffle, seed=seed, drop_last=drop_last, **self._replicas
        )
        if drop_last and len(sampler) < batch_size:
            raise ValueError(
                f"{type(self).__name__}(drop_last=True): the {len(samples)} training samples give each of "  # type: ignore[arg-type]
                f"{sampler.num_replicas} data-parallel ranks {len(sampler)}, too few for one batch of {batch_size}. "
                "Lower `batch_size`, or use more text."
            )
        return sampler

    @property
    def _replicas(self) -> dict[str, int]:
        """The number of data-parallel ranks and this rank's number, as arguments of a ``DistributedSampler``."""
        replicas = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return replicas or {"num_replicas": 1, "rank": 0}


class CollatePacked:
    """Hands packed samples to a collate function that expects ``input_ids``.

    Args:
        collate_fn: The function, which makes a batch from samples with ``input_ids`` ``[seq_length]``.
    """

    def __init__(self, collate_fn: Collator) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> Any:
        """Make a batch, without the last token of each sample, which only GPT's labels need."""
        tokens = [sample["tokens"] if "tokens" in sample else sample["text"][:-1] for sample in samples]
        return self.collate_fn([{"input_ids": each} for each in tokens])


def default_cache_dir(name: str) -> Path:
    """The folder ``lightning_megatron/NAME`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_megatron" / name
