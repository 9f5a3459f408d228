"""A data module that turns text files into samples for a language model."""

from itertools import accumulate
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_megatron.data.datamodule import (
    PARTS,
    USED,
    CollatePacked,
    Collator,
    Loader,
    TokenizedDataModule,
    default_cache_dir,
)
from lightning_megatron.data.text.packing import PackedTextDataset, find_packed, pack
from lightning_megatron.data.text_files import find_text_files, standard_library_sources
from lightning_megatron.data.tokenizers import Tokenizer
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments


@answer_wrong_names
class TextDataModule(TokenizedDataModule):
    """Packs text files into samples of ``seq_length + 1`` tokens, for training a language model from scratch.

    Batches are ``{"text": int64 [batch_size, seq_length + 1]}``, or what ``collate_fn`` makes. The first run tokenises
    the text into a cache, which later runs map into memory. Prediction runs over the test split.

    Args:
        paths: Text files and folders, one or several. By default the sources of Python's standard library, which are
            on every machine.
        seq_length: Tokens that the model sees at once.
        batch_size: Samples of one optimizer step on one data-parallel rank; the strategy cuts them into micro-batches.
        tokenizer: ``"bytes"``, the path of a ``tokenizer.json``, a transformers folder or hub name, or a tokenizer.
        split: The shares of the samples for training, validation and test, contiguous in this order. They sum to 1.
            Lightning skips a validation of 0.
        suffixes: The endings of the files to take from folders.
        cache_dir: The folder of the tokens. By default ``lightning_megatron/text`` in the user's cache folder.
        num_workers: Number of processes that load samples; 0 loads them in the training process.
        seed: Seed of the training order. The same seed gives the same order; each epoch has its own.
        shuffle: Whether training takes the samples in a random order.
        drop_last: Whether training leaves out the last samples if they do not fill a batch. Otherwise the last batch is
            shorter, and a few samples are seen twice if their number does not divide by the data-parallel size.
        collate_fn: A function, for BERT and T5, that makes a batch from samples with ``input_ids`` ``[seq_length]``.

    Raises:
        ValueError: A size is not positive, or ``split`` is not three shares that sum to 1.
    """

    def __init__(
        self,
        paths: str | Path | list[str | Path] | None = None,
        seq_length: int = 256,
        batch_size: int = 8,
        tokenizer: str | Path | Tokenizer = "bytes",
        split: tuple[float, float, float] = (0.98, 0.01, 0.01),
        suffixes: tuple[str, ...] = (".py", ".txt", ".md"),
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
        seed: int = 1234,
        shuffle: bool = True,
        drop_last: bool = False,
        collate_fn: Collator | None = None,
    ) -> None:
        super().__init__(tokenizer)
        arguments = Arguments(type(self).__name__)
        arguments.whole(None, seq_length=seq_length, batch_size=batch_size, seed=seed)
        arguments.whole(0, num_workers=num_workers)
        arguments.flag(shuffle=shuffle, drop_last=drop_last)
        for name, value in (("seq_length", seq_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}({name}={value}) must be at least 1.")
        if len(split) != len(PARTS) or min(split) < 0 or abs(sum(split) - 1) > 1e-6:
            raise ValueError(
                f"{type(self).__name__}(split={split}) must be three parts (train, val, test), none negative, that sum "
                "to 1, such as (0.98, 0.01, 0.01)."
            )
        self.paths = paths
        self.seq_length = seq_length
        self.batch_size = batch_size
        self.split = split
        self.suffixes = suffixes
        self.cache_dir = default_cache_dir("text") if cache_dir is None else Path(cache_dir).expanduser()
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.collate_fn = collate_fn
        self._datasets: dict[str, PackedTextDataset] = {}

    @override
    def prepare_data(self) -> None:
        """Tokenise the text, unless the cache has it. Lightning calls this on one process of each machine."""
        pack(self._files(), self.tokenizer, self.cache_dir)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open the packed text and split its samples.

        Raises:
            RuntimeError: ``prepare_data`` was not called.
            ValueError: The text is too short for ``seq_length``, or for a split that ``stage`` needs.
        """
        bin_path = find_packed(self._files(), self.tokenizer, self.cache_dir)
        if bin_path is None:
            raise RuntimeError(
                f"{self.cache_dir} has no tokens of this text with this tokenizer: call `prepare_data()` before "
                "`setup()`, on every machine that does not share this folder."
            )
        num_samples = len(PackedTextDataset(bin_path, self.seq_length))
        stops = [round(num_samples * part) for part in accumulate(self.split)]
        ranges = dict(zip(PARTS, map(range, [0, *stops], stops), strict=False))
        self._refuse_empty(stage, ranges)
        self._datasets = {name: PackedTextDataset(bin_path, self.seq_length, ranges[name]) for name in PARTS}

    @override
    def train_dataloader(self) -> Loader:
        """Return the training batches of this data-parallel rank.

        The order depends on ``seed`` and the epoch alone, so model-parallel peers, who share a data-parallel rank, see
        the same batches. The Trainer sets the epoch; without one, call ``loader.sampler.set_epoch(epoch)``.

        Raises:
            ValueError: ``drop_last`` leaves no batch.
        """
        dataset = self._dataset("train")
        sampler = self._sampler(dataset, self.batch_size, self.shuffle, self.seed, self.drop_last)
        return self._loader(dataset, sampler=sampler, drop_last=self.drop_last)

    def _files(self) -> list[Path]:
        return standard_library_sources() if self.paths is None else find_text_files(self.paths, self.suffixes)

    def _dataset(self, name: str) -> PackedTextDataset:
        if not self._datasets:
            raise RuntimeError(f"{type(self).__name__} has no data yet: call `prepare_data()` and `setup()` first.")
        return self._datasets[name]

    def _ordered(self, name: str) -> Loader | list[Loader]:
        # Lightning shares these out over the data-parallel ranks.
        dataset = self._dataset(name)
        return self._loader(dataset) if len(dataset) else []

    def _loader(self, dataset: PackedTextDataset, **options: Any) -> Loader:
        collate = None if self.collate_fn is None else CollatePacked(self.collate_fn)
        # `batch_size` is a keyword because Lightning makes a prediction's loader again with another batch size.
        return DataLoader(
            dataset, batch_size=self.batch_size, collate_fn=collate, num_workers=self.num_workers, **options
        )

    def _refuse_empty(self, stage: str | None, ranges: dict[str, range]) -> None:
        num_samples = sum(map(len, ranges.values()))
        parts = dict(zip(PARTS, self.split, strict=True))
        needed = USED[stage][0]
        for name in USED[stage]:
            if not ranges[name] and (name == needed or parts[name] > 0):
                raise ValueError(
                    f"{type(self).__name__}: the {name} split is empty: {parts[name]:g} of {num_samples} samples of "
                    f"seq_length={self.seq_length}, with split={tuple(self.split)}. Enlarge its part of `split`"
                    + ("" if name == needed else ", give it 0")
                    + ", lower `seq_length`, or use more text."
                )
