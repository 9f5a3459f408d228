"""``RowEncoder``: what makes the token ids and labels of one row of a dataset, and of many at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_megatron.data.huggingface.dataset_source import library


class RowEncoder(ABC):
    """Makes a sample from a row of a dataset: ``input_ids``, perhaps ``labels``, and columns that are kept."""

    @abstractmethod
    def check(self, columns: Sequence[str]) -> None:
        """Refuse columns that the dataset does not have."""

    @abstractmethod
    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make the sample of a row; None if nothing in it is learnt."""

    @property
    @abstractmethod
    def identity(self) -> tuple[Any, ...]:
        """A value that two encoders share exactly when they encode alike."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The names of a sample's columns; all but the kept ones hold lists of int32."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The columns of the dataset that a sample keeps as they are."""
        return ()

    def encode_columns(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Encode many rows at once, in the form in which ``Dataset.map`` gives them."""
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        samples = [sample for row in rows if (sample := self(row)) is not None]
        return {name: [sample[name] for sample in samples] for name in self.names}

    def features(self, given: Mapping[str, Any]) -> Any:
        """The types of the encoded columns, given those of the dataset."""
        datasets = library()
        tokens = datasets.List(datasets.Value("int32"))
        return datasets.Features({name: given[name] if name in self.kept else tokens for name in self.names})
