"""Hugging Face datasets opened by name, path or object, and the rows of them that a split names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_megatron.distributed import extras
from lightning_megatron.distributed.suggestions import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Rows: TypeAlias = Dataset | IterableDataset

# A file by its own path; `load_dataset` wants the name of what reads it.
_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}


def library() -> Any:
    """The ``datasets`` package.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    extras.require("datasets", "datasets", "HFDataModule")
    import datasets

    return datasets


def is_stream(rows: Any) -> bool:
    """Whether rows come one after the other, and cannot be told by their number."""
    return isinstance(rows, library().IterableDataset)


def open_splits(dataset: Any, streaming: bool, **options: Any) -> dict[str, Rows]:
    """All splits of a dataset, by name.

    Args:
        dataset: A name on the hub or of a reader ("json", "csv", "parquet", "text"), the path of a file, of a folder of
            them or of one that ``save_to_disk`` wrote; or a dataset, or a mapping of several. One without a name is
            "train".
        streaming: Whether rows are read as they are needed.
        **options: For ``datasets.load_dataset``.

    Raises:
        ValueError: There is nothing of that name, or it cannot be read.
        TypeError: ``dataset`` is none.
    """
    datasets = library()
    kinds = (datasets.Dataset, datasets.IterableDataset)
    if isinstance(dataset, (str, Path)):
        dataset = _load(str(dataset), streaming, options)
    splits = {"train": dataset} if isinstance(dataset, kinds) else dataset
    if not isinstance(splits, Mapping) or not all(isinstance(rows, kinds) for rows in splits.values()):
        raise TypeError(
            f"HFDataModule(dataset={dataset!r}): give a name, a path, a Dataset or IterableDataset of Hugging Face's"
            " datasets, or a mapping of them by split."
        )
    if streaming:
        mapped = [name for name, rows in splits.items() if not is_stream(rows) and len(rows)]
        return {**splits, **{name: splits[name].to_iterable_dataset() for name in mapped}}
    return dict(splits)


def choose(splits: Mapping[str, Rows], wanted: Sequence[str | float | None]) -> list[Rows | None]:
    """The rows of each of ``wanted``: splits' names and slices ("train[:98%]+test"), or shares of the first split.

    Raises:
        ValueError: A split that is not there, or a slice of a stream.
    """
    if all(isinstance(part, (int, float)) for part in wanted):
        return _shares(splits, [float(part) for part in wanted])  # type: ignore[arg-type]
    return [None if part is None else _named(splits, str(part)) for part in wanted]


def check_column(column: str, columns: Collection[str], argument: str) -> None:
    """Refuse a column that is not there.

    Raises:
        ValueError: With the columns, and the one that may have been meant.
    """
    if column not in columns:
        raise ValueError(
            f"HFDataModule({argument}={column!r}): the dataset has no such column, but {list(columns)}."
            f"{did_you_mean(column, columns)}"
        )


def _load(name: str, streaming: bool, options: dict[str, Any]) -> Any:
    datasets = library()
    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if path.is_file() and path.suffix in _READERS:
            options = {"delimiter": "\t", **options} if path.suffix == ".tsv" else options
            options["data_files"] = str(path)
            name = _READERS[path.suffix]
        return datasets.load_dataset(name if not path.is_dir() else str(path), streaming=streaming, **options)
    except Exception as error:  # of many libraries: of the network, file systems, and each format's reader
        raise ValueError(
            f"HFDataModule(dataset={name!r}): datasets cannot load it with {options} ({type(error).__name__}: {error})."
            " Give a name on the hub where it can be reached, 'json', 'csv', 'parquet' or 'text' with data_files, a"
            f" file, or a folder (seen from {Path.cwd()})."
        ) from error


def _shares(splits: Mapping[str, Rows], shares: list[float]) -> list[Rows | None]:
    name = "train" if "train" in splits else next(iter(splits))
    rows: Any = splits[name]
    if is_stream(rows):
        raise ValueError(
            f"HFDataModule(split={tuple(shares)}): a stream's length is not known, so it has no shares. Name splits,"
            f" such as ('{name}', None, None); this one has {list(splits)}."
        )
    stops = [round(len(rows) * part) for part in accumulate(shares)]
    return [
        _rows_between(rows, start, stop) if share else None
        for share, start, stop in zip(shares, [0, *stops], stops, strict=False)
    ]


def _named(splits: Mapping[str, Rows], name: str) -> Rows:
    """One split, or slices and sums of them as ``load_dataset(split=)`` takes them."""
    datasets = library()
    if name in splits:
        return splits[name]
    lengths = {split: 1 if is_stream(rows) else len(rows) for split, rows in splits.items()}
    try:
        slices = datasets.ReadInstruction.from_spec(name).to_absolute(lengths)
    except ValueError as error:
        raise ValueError(
            f"HFDataModule(split={name!r}): {str(error).rstrip('.')}. The dataset has {list(splits)}."
            f"{did_you_mean(name, map(str, splits))}"
        ) from error
    if any(is_stream(splits[part.splitname]) for part in slices):
        raise ValueError(
            f"HFDataModule(split={name!r}): a stream is read whole. Name one of {list(splits)}, or give the stream's"
            " take() and skip() as dataset={'train': ..., 'validation': ...}."
        )
    return datasets.concatenate_datasets([_rows_between(splits[p.splitname], p.from_, p.to) for p in slices])


def _rows_between(rows: Any, start: int, stop: int) -> Any:
    return rows.select(range(start, stop) if start < stop else [])  # `select` has no empty range at the end
