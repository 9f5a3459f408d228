"""Opens Hugging Face datasets by name, path or object, and chooses the rows that a split names."""

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

# The reader of a file, by the file's suffix; `load_dataset` takes the reader's name.
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
    """Import the ``datasets`` package.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    extras.require("datasets", "datasets", "HFDataModule")
    import datasets

    return datasets


def is_stream(rows: Any) -> bool:
    """Whether rows can only be read one after another, and have no index."""
    return isinstance(rows, library().IterableDataset)


def open_splits(dataset: Any, streaming: bool, **options: Any) -> dict[str, Rows]:
    """Open all splits of a dataset.

    Args:
        dataset: A name on the hub, the name of a reader ("json", "csv", "parquet", "text"), the path of a file, of a
            folder of files or of a folder that ``save_to_disk`` wrote; or a dataset, or a mapping of several. A single
            dataset is the split "train".
        streaming: Whether rows are read as they are needed.
        **options: Further arguments of ``datasets.load_dataset``.

    Returns:
        The rows of each split, by its name.

    Raises:
        ValueError: There is no such dataset, or it cannot be read.
        TypeError: ``dataset`` has another type.
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
    """Choose the rows of each of ``wanted``: names and slices of splits ("train[:98%]+test"), or shares of one split.

    Raises:
        ValueError: There is no such split, or a slice of a stream is asked for.
    """
    if all(isinstance(part, (int, float)) for part in wanted):
        return _shares(splits, [float(part) for part in wanted])  # type: ignore[arg-type]
    return [None if part is None else _named(splits, str(part)) for part in wanted]


def check_column(column: str, columns: Collection[str], argument: str, owner: str = "HFDataModule") -> None:
    """Refuse a column that the dataset does not have, given as an argument of the class ``owner``.

    Raises:
        ValueError: There is no such column. The message lists the columns, and suggests one.
    """
    if column not in columns:
        raise ValueError(
            f"{owner}({argument}={column!r}): the dataset has no such column; it has {list(columns)}."
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
    except Exception as error:  # the network, file systems and readers raise errors of many types
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
            f"HFDataModule(split={tuple(shares)}): a stream has no known length, so it has no shares. Name splits,"
            f" such as ('{name}', None, None); this stream has {list(splits)}."
        )
    stops = [round(len(rows) * part) for part in accumulate(shares)]
    return [
        _rows_between(rows, start, stop) if share else None
        for share, start, stop in zip(shares, [0, *stops], stops, strict=False)
    ]


def _named(splits: Mapping[str, Rows], name: str) -> Rows:
    """The rows of a split, or of slices and sums of splits in the notation of ``load_dataset(split=)``."""
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
            f"HFDataModule(split={name!r}): a stream has no slices. Name one of {list(splits)}, or give the stream's"
            " take() and skip() as dataset={'train': ..., 'validation': ...}."
        )
    return datasets.concatenate_datasets([_rows_between(splits[p.splitname], p.from_, p.to) for p in slices])


def _rows_between(rows: Any, start: int, stop: int) -> Any:
    return rows.select(range(start, stop) if start < stop else [])  # `select` refuses an empty range at the end
