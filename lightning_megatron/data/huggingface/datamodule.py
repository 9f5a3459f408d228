"""A data module over Hugging Face's datasets, which may be mapped or streamed, packed or padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_megatron.data.collators.padding import PaddingCollator
from lightning_megatron.data.datamodule import PARTS, USED, CollatePacked, Collator, Loader, TokenizedDataModule
from lightning_megatron.data.huggingface import dataset_source
from lightning_megatron.data.huggingface.documents import Encoder, PackedDocuments, labels_in, tokenise
from lightning_megatron.data.huggingface.row_encoder import RowEncoder
from lightning_megatron.data.huggingface.streams import DocumentStream, PackedStream, StreamLoader
from lightning_megatron.data.huggingface.whole_texts import (
    CollateNumberedTexts,
    CollateWholeTexts,
    WholeTexts,
    WholeTextStream,
)
from lightning_megatron.data.tokenizers import Tokenizer
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from lightning_megatron.data.huggingface.dataset_source import Rows


@answer_wrong_names
class HFDataModule(TokenizedDataModule):
    """Samples of a Hugging Face dataset, tokenised.

    With ``packing``, rows follow one another and batches are ``{"text": int64 [batch_size, seq_length + 1]}``. With
    ``packing="whole"``, whole rows of the dataset share a row of tokens where they fit, and none looks at another:
    batches are ``input_ids``, ``labels`` and ``position_ids`` ``[batch_size, s]``; a ``collate_fn`` is given
    ``input_ids`` and ``seq_idx``. Without packing, a sample is a row, and batches are ``input_ids``, ``attention_mask``
    and ``labels`` ``[batch_size, s]``, padded to their longest sample. In the last two, a row is cut at ``seq_length``,
    and labels are −100 on padding and prompts. Prediction runs over the test split.

    Texts and prompts begin as the tokenizer's own call begins them (for example with Llama's BOS), and messages of a
    chat become text by the tokenizer's chat template. Where rows of ids have a column ``labels``, these are the labels,
    and nothing is added to the ids; packed batches then are ``tokens`` and ``labels`` ``[batch_size, seq_length]``.

    Datasets are tokenised once, into the cache of ``datasets``, and shared out by sample. Streams are tokenised while
    they are read. They are shared out by shard where the number of shards divides by the replicas, and otherwise by
    row. An epoch of a stream ends when the first replica has no batch left, so a few samples of the others may not be
    seen in it. A resumed run continues at the next sample of either.

    Args:
        dataset: A name on the hub, the name of a reader ("json", "csv", "parquet", "text"), the path of a file, of a
            folder of files or of a folder that ``save_to_disk`` wrote; or a ``Dataset`` or ``IterableDataset``, or a
            mapping from splits to them.
        config_name: Configuration of a named dataset that has several.
        data_files: The files that a reader reads, or some of the files of a named dataset.
        load_options: Further arguments of ``datasets.load_dataset``, such as ``revision``, ``field`` or ``sample_by``.
        streaming: Whether rows are read as they are needed. An ``IterableDataset`` is streamed anyway.
        split: The splits for training, validation and test. Each is a name, a slice or sum such as ``"train[:98%]"``,
            or None. Or give three shares of the only split, contiguous in this order, such as ``(0.98, 0.01, 0.01)``.
            Streams take only names.
        text_column: The column with the text, with messages that have ``role`` and ``content``, or with lists of ids.
            Ids are taken as they are, without those that a column ``attention_mask`` hides.
        prompt_column: The column with the beginning of a sample, which has no labels, for supervised fine-tuning.
        keep_columns: Further columns that ``collate_fn`` needs.
        tokenizer: ``"bytes"``, the path of a ``tokenizer.json``, a transformers folder or hub name, or a tokenizer.
        append_eod: Whether the end-of-document id is added to texts that do not end with it.
        seq_length: Tokens that the model sees at once.
        batch_size: Samples of one optimizer step on one data-parallel rank; the strategy cuts them into micro-batches.
        packing: Whether rows are packed one after another into samples of equal length. "whole": rows stay whole, and
            as many share a sample as fit.
        collate_fn: A function, for BERT and T5, that makes a batch from samples with ``input_ids``, ``[seq_length]`` if
            packed; with packing="whole" also ``seq_idx``, the number of each token's text.
        shuffle: Whether training takes the samples in a random order. Streams are shuffled by shard, and by row within
            blocks of ``shuffle_block`` rows.
        shuffle_block: Number of rows of a stream that are shuffled with each other.
        seed: Seed of the training order. The same seed gives the same order; each epoch has its own.
        drop_last: Whether training leaves out the last samples if they do not fill a batch.
        num_proc: Number of processes that load and tokenise a dataset.
        num_workers: Number of processes that load samples. 0, which streams need, loads them in the training process.
        cache_dir: A folder in place of the own cache of ``datasets``.

    Raises:
        ValueError: A number is not positive, ``split`` has another form, or arguments do not go together.
    """

    def __init__(
        self,
        dataset: str | Path | Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset],
        config_name: str | None = None,
        data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
        load_options: Mapping[str, Any] | None = None,
        streaming: bool = False,
        split: tuple[str | float | None, str | float | None, str | float | None] = ("train", None, None),
        text_column: str = "text",
        prompt_column: str | None = None,
        keep_columns: Sequence[str] = (),
        tokenizer: str | Path | Tokenizer = "bytes",
        append_eod: bool = True,
        seq_length: int = 256,
        batch_size: int = 8,
        packing: bool | Literal["whole"] = True,
        collate_fn: Collator | None = None,
        shuffle: bool = True,
        shuffle_block: int = 1000,
        seed: int = 1234,
        drop_last: bool = False,
        num_proc: int | None = None,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(tokenizer)
        positive = {"seq_length": seq_length, "batch_size": batch_size, "shuffle_block": shuffle_block}
        arguments = Arguments(type(self).__name__)
        arguments.whole(None, seq_length=seq_length, batch_size=batch_size, shuffle_block=shuffle_block, seed=seed)
        arguments.whole(None, optional=True, num_proc=num_proc)
        arguments.whole(0, num_workers=num_workers)
        arguments.flag(streaming=streaming, append_eod=append_eod, shuffle=shuffle, drop_last=drop_last)
        arguments.one_of((True, False, "whole"), packing=packing)
        for name, value in {**positive, "num_proc": num_proc}.items():
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}({name}={value}) must be at least 1.")
        self.dataset = dataset
        self.options = {"name": config_name, "data_files": data_files, "num_proc": num_proc, **(load_options or {})}
        self.options = {name: value for name, value in self.options.items() if value is not None}
        self.streaming = streaming
        if isinstance(split, str):
            raise ValueError(
                f"{type(self).__name__}(split={split!r}) must name three splits (training, validation, test), or"
                f" None for a split, such as ({split!r}, None, None)."
            )
        self.split = tuple(split)
        self.text_column = text_column
        self.prompt_column = prompt_column
        self.keep_columns = tuple(keep_columns)
        self.append_eod = append_eod
        self.seq_length = seq_length
        self.batch_size = batch_size
        self.packing = packing
        self.collate_fn = collate_fn
        self.shuffle = shuffle
        self.shuffle_block = shuffle_block
        self.seed = seed
        self.drop_last = drop_last
        self.num_proc = num_proc
        self.num_workers = num_workers
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self._opened: dict[str, Any] = {}
        self._labelled: dict[str, bool] = {}  # whether the rows of a split have labels of their own
        self._refuse_odd_arguments()

    @override
    def prepare_data(self) -> None:
        """Load and tokenise datasets that are no streams. Lightning calls this on one process of each machine."""
        for name, rows in self._rows().items():
            self._check(name, rows)
            if not dataset_source.is_stream(rows):
                self._tokenise(name, rows)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open the datasets that ``prepare_data`` has tokenised.

        Raises:
            ValueError: A split that ``stage`` needs is not named, is empty, or is too short for ``seq_length``.
        """
        splits, needed = self._rows(), USED[stage][0]
        if needed not in splits:
            raise ValueError(
                f"{type(self).__name__}(split={self.split}) names no {needed} split, and this run needs it."
            )
        for name in USED[stage]:
            if name in splits and name not in self._opened:
                self._check(name, splits[name])
                self._opened[name] = self._open(name, splits[name])

    @override
    def train_dataloader(self) -> Loader:
        """Return the training batches of this data-parallel rank.

        The order depends on ``seed`` and the epoch alone, so model-parallel peers, who share a data-parallel rank, see
        the same batches. The Trainer sets a dataset's epoch; without one, call ``loader.sampler.set_epoch(epoch)``.

        Raises:
            ValueError: ``drop_last`` leaves no batch.
        """
        samples = self._samples("train")
        if dataset_source.is_stream(samples):
            return self._stream("train", samples, self.seed if self.shuffle else None, self.drop_last)
        sampler = self._sampler(samples, self.batch_size, self.shuffle, self.seed, self.drop_last)
        return self._loader(samples, sampler=sampler, drop_last=self.drop_last)

    def _encoder(self, name: str) -> RowEncoder:
        columns = (self.text_column, self.prompt_column, self.keep_columns)
        longest = None if self.packing is True else self.seq_length
        return Encoder(self.tokenizer, *columns, self.append_eod, longest, self._labelled[name])

    @property
    def _collator(self) -> Collator | None:
        if self.packing == "whole":
            own = self.collate_fn
            return CollateWholeTexts(self.tokenizer.eod_id) if own is None else CollateNumberedTexts(own)
        if self.packing:
            return None if self.collate_fn is None else CollatePacked(self.collate_fn)
        return self.collate_fn or PaddingCollator(self.tokenizer.eod_id)

    def _pack(self, documents: Dataset) -> Any:
        return (WholeTexts if self.packing == "whole" else PackedDocuments)(documents, self.seq_length)

    def _pack_stream(self, documents: DocumentStream) -> Any:
        return (WholeTextStream if self.packing == "whole" else PackedStream)(documents, self.seq_length)

    def _rows(self) -> dict[str, Rows]:
        """The rows of each split that has a name."""
        options = dict(self.options) if self.cache_dir is None else {**self.options, "cache_dir": str(self.cache_dir)}
        with torch.device("cpu"):  # a stream makes tensors that it shares with workers
            splits = dataset_source.open_splits(self.dataset, self.streaming, **options)
            chosen = zip(PARTS, dataset_source.choose(splits, self.split), strict=True)
        return {name: rows for name, rows in chosen if rows is not None}

    def _check(self, name: str, rows: Any) -> Mapping[str, Any]:
        """Refuse a split without rows, or without a column that is asked for; return its first row."""
        with torch.device("cpu"):
            first = next(iter(rows.take(1)), None)
        if first is None:
            raise ValueError(
                f"{type(self).__name__}: the {name} split is empty, with split={self.split}. Name another split, or"
                " enlarge its part."
            )
        has_text = self.text_column in first
        self._labelled[name] = has_text and self._leaves_labels(first) and labels_in(first, self.text_column)
        self._encoder(name).check(list(first))
        return first

    def _leaves_labels(self, row: Mapping[str, Any]) -> bool:
        """Whether a column "labels" holds the labels; a collate function makes its own, or asks for the column."""
        if self.collate_fn is None:
            return True
        return not (self.packing or "labels" in self.keep_columns or isinstance(row[self.text_column], str))

    def _tokenise(self, name: str, rows: Dataset) -> Dataset:
        cache_dir = self.cache_dir or Path(dataset_source.library().config.HF_DATASETS_CACHE)
        return tokenise(rows, self._encoder(name), cache_dir / "lightning_megatron", self.num_proc)

    def _open(self, name: str, rows: Any) -> Any:
        """Open a split: as a stream, or as the samples of a dataset."""
        if dataset_source.is_stream(rows):
            if self.num_workers:
                raise ValueError(
                    f"{type(self).__name__}(num_workers={self.num_workers}): only the training process can read a"
                    " stream, because a checkpoint saves its position. Use num_workers=0, or a dataset."
                )
            return rows
        documents = self._tokenise(name, rows)
        samples = self._pack(documents) if self.packing else documents
        if not len(samples):
            tokens = f"no text to learn in seq_length={self.seq_length} tokens"
            if isinstance(samples, PackedDocuments):
                tokens = f"{samples.num_tokens} tokens, and one sample takes seq_length + 1 = {self.seq_length + 1}"
            raise ValueError(
                f"{type(self).__name__}: the {name} split has no sample: its {len(rows)} rows have {tokens}. Use"
                " another seq_length, or more text."
            )
        return samples

    def _samples(self, name: str) -> Any:
        if not self._opened:
            raise RuntimeError(f"{type(self).__name__} has no data yet: call `prepare_data()` and `setup()` first.")
        return self._opened[name]

    def _ordered(self, name: str) -> Loader | list[Loader]:
        if self._opened and name not in self._opened:
            return []
        samples = self._samples(name)
        # Lightning shares a dataset out over the data-parallel ranks.
        return self._stream(name, samples, None, False) if dataset_source.is_stream(samples) else self._loader(samples)

    def _loader(self, samples: Any, **options: Any) -> Loader:
        # `batch_size` is a keyword because Lightning makes a prediction's loader again with another batch size.
        return DataLoader(
            samples, batch_size=self.batch_size, collate_fn=self._collator, num_workers=self.num_workers, **options
        )

    def _stream(self, name: str, rows: IterableDataset, seed: int | None, drop_last: bool) -> StreamLoader:
        from datasets.distributed import split_dataset_by_node

        replicas = self._replicas
        with torch.device("cpu"):
            own = split_dataset_by_node(rows, rank=replicas["rank"], world_size=replicas["num_replicas"])
        stream: Any = DocumentStream(own, self._encoder(name), self.shuffle_block, seed)
        if self.packing:
            stream = self._pack_stream(stream)
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        return StreamLoader(
            stream,
            replicas=replicas["num_replicas"],
            device=device,
            batch_size=self.batch_size,
            collate_fn=self._collator,
            drop_last=drop_last,
        )

    def _refuse_odd_arguments(self) -> None:
        name, numbers = type(self).__name__, [part for part in self.split if isinstance(part, (int, float))]
        if len(self.split) != len(PARTS) or (
            numbers and (len(numbers) < len(PARTS) or min(numbers) < 0 or abs(sum(numbers) - 1) > 1e-6)
        ):
            raise ValueError(
                f"{name}(split={self.split}) must be three names (train, val, test), or None for one, such as"
                " ('train', 'validation', None); or three parts, none negative, that sum to 1."
            )
        if (self.packing is True and self.prompt_column is not None) or (self.packing and self.keep_columns):
            raise ValueError(
                f"{name}(prompt_column={self.prompt_column!r}, keep_columns={self.keep_columns}): packed"
                " samples hold several rows, so they have no prompt and no columns of a row. Use packing=False, or for"
                " prompts packing='whole'."
            )
        if self.keep_columns and self.collate_fn is None:
            raise ValueError(f"{name}(keep_columns={self.keep_columns}) needs a collate_fn that uses them.")
        if self.streaming and self.num_proc is not None:
            raise ValueError(
                f"{name}(streaming=True, num_proc={self.num_proc}): a stream is tokenised while it is read. Leave one"
                " out."
            )
