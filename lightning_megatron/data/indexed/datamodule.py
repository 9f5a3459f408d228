"""A data module over Megatron's indexed data, whose blends, splits and samples are made by megatron-core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix
from megatron.core.datasets.utils import normalize
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_megatron.data.datamodule import PARTS, USED, Loader, TokenizedDataModule, default_cache_dir
from lightning_megatron.data.indexed import index_cache
from lightning_megatron.data.indexed.batch_size_rampup import BatchSizes
from lightning_megatron.data.indexed.files import check_contents, open_indexed
from lightning_megatron.data.indexed.growing_batches import RampUpBatches, ramp_up_loader
from lightning_megatron.data.indexed.samples import IndexedSamples, Sample
from lightning_megatron.data.tokenizers import Tokenizer
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments


@answer_wrong_names
class MegatronDataModule(TokenizedDataModule):
    """Samples of ``.bin`` and ``.idx`` files, as ``lightning-megatron preprocess`` and Megatron's tools write them.

    Training reads ``train_samples`` samples in Megatron's order, which is shuffled once over all passes through the
    data. For Lightning, all of them are one epoch. Global batch ``k`` holds the same samples whatever the data-parallel
    size, so a run may be resumed on another size at the next sample. Evaluation reads its part of the data once.
    Prediction runs over the test part.

    Args:
        paths: The prefix of the files (their path without the ending), or several prefixes to blend.
        samples: ``GPTSamples``, ``BertSamples`` or ``T5Samples``.
        weights: How often samples are drawn from each of several ``paths``, relative to the others. By default each
            sample is read as often as any other.
        tokenizer: The tokenizer that made the data: ``"bytes"``, a ``tokenizer.json``, a transformers folder or
            hub name, or a tokenizer.
        batch_size: Samples of one optimizer step on one data-parallel rank; the strategy cuts them into micro-batches.
        global_batch_size: Samples of one optimizer step on all data-parallel ranks, in place of ``batch_size``.
        split: Weights of training, validation and test, in whose order the data is cut. Lightning skips a part of 0.
        train_samples: Number of training samples. By default the number that ``Trainer(max_steps=)`` needs; without
            ``max_steps``, each epoch reads each sample once, in its own order.
        seed: Seed of the order, the masks and the spans; 1 or more.
        cache_dir: Folder of the indices. By default ``lightning_megatron/indices`` in the user's cache folder.
        num_workers: Number of processes that load samples; 0 loads them in the training process.
        ramp_up: The rule by which training's batches grow to the size above. It needs ``max_steps`` or
            ``train_samples``.

    Raises:
        ValueError: A number is out of range, the weights do not fit the paths, or ``split`` has another form.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        samples: IndexedSamples,
        weights: Sequence[float] | None = None,
        tokenizer: str | Path | Tokenizer = "bytes",
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        split: str = "969,30,1",
        train_samples: int | None = None,
        seed: int = 1234,
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
        ramp_up: BatchSizes | None = None,
    ) -> None:
        super().__init__(tokenizer)
        arguments = Arguments(type(self).__name__)
        sizes = {"batch_size": batch_size, "global_batch_size": global_batch_size, "train_samples": train_samples}
        arguments.whole(None, optional=True, **sizes)
        arguments.whole(None, seed=seed)
        arguments.whole(0, num_workers=num_workers)
        given = {"batch_size": batch_size, "global_batch_size": global_batch_size, "train_samples": train_samples}
        for name, value in {**given, "seed": seed}.items():
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}({name}={value}) must be at least 1.")
        if (batch_size is None) == (global_batch_size is None):
            raise ValueError(
                f"{type(self).__name__}(batch_size={batch_size}, global_batch_size={global_batch_size}): give one of"
                " the two: the samples of one data-parallel rank, or of all."
            )
        if not isinstance(samples, IndexedSamples):
            raise TypeError(
                f"{type(self).__name__}(samples={samples!r}): use GPTSamples(seq_length=...), BertSamples or T5Samples."
            )
        self.paths = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        self.samples = samples
        self.weights = _weights(self.paths, weights)
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.split = split
        self.train_samples = train_samples
        self.seed = seed
        self.cache_dir = default_cache_dir("indices") if cache_dir is None else Path(cache_dir).expanduser()
        self.num_workers = num_workers
        self.ramp_up = ramp_up
        self._bounds = dict(zip(PARTS, _bounds(split), strict=True))
        self._datasets: dict[str, _Samples] = {}

    @property
    def seq_length(self) -> int:
        """The number of tokens of a sample, which is the model's ``seq_length``."""
        return self.samples.seq_length

    @override
    def prepare_data(self) -> None:
        """Check the data, and build missing indices. Lightning calls this on one process of each machine.

        Raises:
            IndexedDataError: Files are missing or corrupt, or have an empty document.
            ValueError: A part of the data has no sample.
        """
        stage = None if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value
        data = {path: open_indexed(path) for path in self.paths}
        for path in self.paths:
            check_contents(path, data[path])
            for part in self._used(stage):
                if (why := self.samples.too_little(data[path], *self._share(part))) is not None:
                    raise ValueError(
                        f"{type(self).__name__}: the {part} part of {path} has no sample, with split={self.split!r}:"
                        f" {why}. Enlarge its part of `split`{'' if part == 'train' else ', or give it 0'}."
                    )
        index_cache.build([self._description(part) for part in self._used(stage)], self.cache_dir)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open the data and their indices, on every rank.

        Raises:
            RuntimeError: ``prepare_data`` was not called.
        """
        for path in self.paths:
            open_indexed(path)
        for part in self._used(stage):
            about = self._description(part)
            dataset = index_cache.open_dataset(about, self.cache_dir)
            self._datasets[part] = _Samples(dataset, about["samples"], self.samples)

    @override
    def train_dataloader(self) -> Loader:
        """Return the training batches of this data-parallel rank; the last samples are left out if they fill no batch.

        Raises:
            ValueError: There are fewer samples than one batch takes.
        """
        dataset, rows = self._dataset("train"), self._rows
        order: type[DistributedSampler[Any]] = DistributedSampler if self._train_samples is None else _StridedSampler
        sampler = order(dataset, shuffle=self._train_samples is None, seed=self.seed, drop_last=True, **self._replicas)
        if len(sampler) < rows:
            raise ValueError(
                f"{type(self).__name__}: {len(dataset)} training samples give each of {sampler.num_replicas}"
                f" data-parallel ranks {len(sampler)}, too few for one batch of {rows}. Use a smaller batch or more"
                " data, or set train_samples, for which the data is read several times."
            )
        if self.ramp_up is not None:
            if self._train_samples is None:
                raise ValueError(
                    f"{type(self).__name__}(ramp_up={self.ramp_up}) needs a number of samples over which batches"
                    " grow. Set Trainer(max_steps=) or train_samples."
                )
            batches = RampUpBatches(sampler, rows, self.ramp_up)
            return ramp_up_loader(dataset, batches, num_workers=self.num_workers)
        return DataLoader(dataset, rows, sampler=sampler, drop_last=True, num_workers=self.num_workers)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The numbers that determine the order of the training samples."""
        about = {"paths": len(self.paths), "weights": self.weights, "split": self.split, "seed": self.seed}
        return {
            **about,
            "seq_length": self.samples.seq_length,
            "train_samples": self._train_samples,
            "ramp_up": self.ramp_up and vars(self.ramp_up),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another order: a resumed run would see some samples twice and others never.

        Raises:
            MisconfigurationException: A number that determines the order has changed since the save.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # no training is resumed
        now = self.state_dict()
        changed = [
            f"{name}={value!r}, and now {now[name]!r}" for name, value in state_dict.items() if value != now[name]
        ]
        if not changed:
            return
        advice = "Set it as it was."
        if now["train_samples"] != state_dict["train_samples"] and self.train_samples is None:
            advice = (
                f"train_samples follows from Trainer(max_steps=). Give train_samples={state_dict['train_samples']}, or"
                " for a longer run start the first run with train_samples for both."
            )
        raise MisconfigurationException(
            f"{type(self).__name__}: the order of the samples depends on numbers that differ from the checkpoint's:"
            f" {'; '.join(changed)}. {advice}"
        )

    @property
    def _rows(self) -> int:
        """The number of samples of a batch of one data-parallel rank."""
        if self.batch_size is not None:
            return self.batch_size
        assert self.global_batch_size is not None
        replicas = self._replicas["num_replicas"]
        if self.global_batch_size % replicas:
            raise ValueError(
                f"{type(self).__name__}(global_batch_size={self.global_batch_size}) does not divide by the"
                f" {replicas} data-parallel ranks. Use {max(self.global_batch_size // replicas, 1) * replicas}."
            )
        return self.global_batch_size // replicas

    @property
    def _train_samples(self) -> int | None:
        """The number of training samples of the run; None where each epoch reads the data once."""
        if self.train_samples is not None or self.trainer is None or self.trainer.max_steps < 0:
            return self.train_samples
        batches = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        full = self._rows * self._replicas["num_replicas"]
        return batches * full if self.ramp_up is None else self.ramp_up.consumed(batches, full)

    def _samples_of(self, part: str) -> int | None:
        if part == "train":
            if self._train_samples is None and self.weights is not None:
                raise ValueError(
                    f"{type(self).__name__}(weights={self.weights}): with weights, some data is read more often than"
                    " other data, so an epoch has no natural length. Set Trainer(max_steps=) or train_samples."
                )
            return self._train_samples
        limit = None if self.trainer is None else getattr(self.trainer, f"limit_{part}_batches")
        if self.weights is None or not isinstance(limit, int):
            return None  # the part is read once; Lightning applies its limit
        return limit * self._rows * self._replicas["num_replicas"]

    def _description(self, part: str) -> index_cache.Description:
        count = self._samples_of(part)
        return {
            "kind": self.samples.kind,
            "paths": self.paths,
            "weights": None if count is None else self.weights,
            "split": self.split,
            "part": PARTS.index(part),
            "samples": count,
            "seed": self.seed,
            "seq_length": self.samples.seq_length,
            "tokenizer": self.samples.tokenizer_fields(self.tokenizer),
            "options": self.samples.options(),
        }

    def _used(self, stage: str | None) -> list[str]:
        """The parts of the split that a stage needs."""
        parts = USED[stage]
        if stage is not None and self._bounds[parts[0]] is None:
            raise ValueError(
                f"{type(self).__name__}(split={self.split!r}) gives nothing to {parts[0]}, and this run needs it."
            )
        return [part for part in parts if self._is_read(part)]

    def _is_read(self, part: str) -> bool:
        limit = 1 if self.trainer is None else getattr(self.trainer, f"limit_{part}_batches")
        return self._bounds[part] is not None and limit != 0

    def _share(self, part: str) -> tuple[float, float]:
        bounds = self._bounds[part]
        assert bounds is not None
        return bounds

    def _dataset(self, part: str) -> _Samples:
        if part not in self._datasets:
            raise RuntimeError(f"{type(self).__name__} has no {part} data yet: call prepare_data() and setup() first.")
        return self._datasets[part]

    def _ordered(self, part: str) -> Loader | list[Loader]:
        # Lightning shares these out over the data-parallel ranks.
        if not self._is_read(part):
            return []
        # `batch_size` is a keyword because Lightning makes a prediction's loader again with another batch size.
        return DataLoader(self._dataset(part), batch_size=self._rows, num_workers=self.num_workers)


class _Samples(Dataset[Sample]):
    """The first ``length`` samples of megatron-core's dataset, in the form that the modules take."""

    def __init__(self, dataset: Any, length: int | None, samples: IndexedSamples) -> None:
        self.dataset = dataset
        self.samples = samples
        self._length = len(dataset) if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        try:
            with torch.device("cpu"):
                sample = self.dataset[index]
        except (AssertionError, IndexError, KeyError) as error:  # megatron-core's own checks, whose errors have no text
            raise ValueError(
                f"Sample {index} of {getattr(self.dataset, 'dataset_path', 'the blend')} cannot be made ({error!r}). An"
                " id may be outside of the tokenizer's vocabulary, if the data was made with another one."
            ) from error
        return self.samples.convert(sample)


class _StridedSampler(DistributedSampler[int]):
    """Gives this rank every ``num_replicas``-th sample without a list of all, of which there may be billions."""

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


def _weights(paths: list[str], weights: Sequence[float] | None) -> list[float] | None:
    if not paths:
        raise ValueError("MegatronDataModule(paths=[]): give the prefix of the data, or several.")
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"MegatronDataModule(paths={paths}) names a path twice. Name it once, with the sum of its weights."
        )
    if weights is None:
        return None
    if len(weights) != len(paths) or min(weights) <= 0:
        raise ValueError(
            f"MegatronDataModule(weights={list(weights)}): {len(paths)} paths take {len(paths)} weights, all above 0;"
            f" the paths are {paths}."
        )
    return [float(weight) for weight in weights] if len(paths) > 1 else None


def _bounds(split: str) -> list[tuple[float, float] | None]:
    """The shares of the data at which each of the three parts begins and ends; None for an empty part."""
    try:
        parts = [float(part) for part in split.split(",")]
    except (AttributeError, ValueError):  # not a text (TextDataModule takes numbers), or a text without numbers
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or sum(parts) == 0:
        raise ValueError(
            f"MegatronDataModule(split={split!r}) must be a text of up to three weights, of training, validation and"
            " test, none negative, such as '969,30,1'."
        )
    return convert_split_vector_to_split_matrix(normalize([*parts, 0.0, 0.0][:3]))
