"""Reads parts of transformers' tensors, from files or from a model in memory."""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from lightning_megatron.hf.meta_model import class_named
from lightning_megatron.hf.refused_architectures import refuse_remote_code
from lightning_megatron.hf.weight_mapping import Shape

_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_GENERATION = "generation_config.json"
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ROWS = 4096  # read at once where whole tensors are compared


class Source:
    """A model of transformers, before any of its weights is read.

    Args:
        name: Name of the model in messages.
        config: transformers' configuration of the model.
        generation: The model's ``generation_config.json``; None: it has none.
    """

    def __init__(self, name: str, config: PreTrainedConfig, generation: dict[str, Any] | None = None) -> None:
        self.name = name
        self.config = config
        self.generation = generation

    @property
    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor, by its name."""

    @property
    @abstractmethod
    def dtypes(self) -> dict[str, str]:
        """The type of each tensor's numbers, such as "bfloat16", by its name."""

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; read in parts, up to the first that differ."""
        shape = self.shapes[one]
        if one == other or shape != self.shapes[other]:
            return one == other
        for start in range(0, shape[0], _ROWS):
            where = (start, *(0 for _ in shape[1:])), (min(_ROWS, shape[0] - start), *shape[1:])
            if not torch.equal(self.read(one, *where), self.read(other, *where)):
                return False
        return True

    @abstractmethod
    def read(self, name: str, offset: Shape, sizes: Shape) -> torch.Tensor:
        """A rectangle of a tensor; of a file, no more than that is read."""


class InMemory(Source):
    """A model that stands in memory.

    Args:
        model: The model.
    """

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]  # which transformers writes only when it saves
        super().__init__(type(model).__name__, config)
        self._tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        if model.can_generate():
            self.generation = model.generation_config.to_diff_dict()

    @property
    def dtypes(self) -> dict[str, str]:
        """The type of each tensor; see ``Source.dtypes``."""
        return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in self._tensors.items()}

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor; see ``Source.shapes``."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, offset: Shape, sizes: Shape) -> torch.Tensor:
        """Read a part of a tensor; see ``Source.read``."""
        return self._tensors[name][tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]


class PickledFiles(InMemory):
    """``pytorch_model.bin``, in one file or several; mapped into memory, so that only what is used is read.

    Args:
        folder: The directory.
        config: The model's configuration.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        Source.__init__(self, str(folder), config, _generation(folder))
        self._tensors = {}
        for file in _files(folder, _PICKLED):
            try:
                mapped = zipfile.is_zipfile(file)  # files older than torch 1.6 are none
                self._tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            except (RuntimeError, OSError, pickle.UnpicklingError) as error:
                raise _damaged(file, error) from error


class SafetensorsFiles(Source):
    """``model.safetensors``, in one file or several.

    Args:
        folder: The directory.
        config: The model's configuration.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        super().__init__(str(folder), config, _generation(folder))
        self._open: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, Shape] = {}
        self._dtypes: dict[str, str] = {}
        for file in _files(folder, _SAFETENSORS):
            opened = self._opened(file)
            for name in opened.keys():  # noqa: SIM118  # it is no dict
                self._where[name] = file
                part = opened.get_slice(name)
                self._shapes[name] = tuple(part.get_shape())
                self._dtypes[name] = _TYPES.get(part.get_dtype(), part.get_dtype())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a rank opens its own

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor; see ``Source.shapes``."""
        return self._shapes

    @property
    def dtypes(self) -> dict[str, str]:
        """The type of each tensor; see ``Source.dtypes``."""
        return self._dtypes

    def read(self, name: str, offset: Shape, sizes: Shape) -> torch.Tensor:
        """Read a part of a tensor; see ``Source.read``."""
        part = self._opened(self._where[name]).get_slice(name)
        where = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True)) or ...
        with torch.device("cpu"):  # a slice obeys the device context, whatever the file was opened for
            return part[where]

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _damaged(file, error) from error
        return self._open[file]


class DescribedModel(InMemory):
    """A model of the hub of which only the configuration is fetched: its tensors have shapes and no numbers.

    Args:
        name: Name of the model on the hub.
        revision: Branch, tag or commit on the hub.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        config = _config(name, revision)
        architecture = str((config.architectures or [""])[0])
        model_class = class_named(architecture)
        if model_class is None:
            raise ValueError(f"{name}: transformers has no model called {architecture or '(config.json names none)'}.")
        with torch.device("meta"):
            super().__init__(model_class(config))
        self.name, self.config, self.generation = name, config, None

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape, which is all that is known of them."""
        return self.shapes[one] == self.shapes[other]


_only_described: ContextVar[bool] = ContextVar("only_described", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, a model on the hub is described by its configuration; none of its weights is fetched."""
    token = _only_described.set(True)
    try:
        yield
    finally:
        _only_described.reset(token)


def open_source(source: str | Path | transformers.PreTrainedModel, revision: str | None = None) -> Source:
    """A source from what a user names it by.

    Args:
        source: A directory, a model of transformers in memory, or a name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub; of a directory or a model it says nothing, as in transformers.

    Raises:
        FileNotFoundError: There is no such directory, or none of its files holds weights.
    """
    if isinstance(source, transformers.PreTrainedModel):
        return InMemory(source)
    folder = Path(source)
    if not folder.is_dir():
        if _only_described.get():
            return DescribedModel(str(source), revision)
        folder = _from_hub(str(source), revision)
    config = _config(folder)
    if (folder / _SAFETENSORS).is_file() or (folder / f"{_SAFETENSORS}.index.json").is_file():
        return SafetensorsFiles(folder, config)
    if (folder / _PICKLED).is_file() or (folder / f"{_PICKLED}.index.json").is_file():
        return PickledFiles(folder, config)
    raise FileNotFoundError(
        f"{folder} holds no weights: neither {_SAFETENSORS} nor {_PICKLED}, nor an index of several such files; it has"
        f" {', '.join(sorted(file.name for file in folder.iterdir())) or 'no files'}."
    )


def _config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """transformers' configuration of a directory, or of a model on the hub."""
    refuse_remote_code(str(source), PreTrainedConfig.get_config_dict(source, revision=revision)[0])
    found: PreTrainedConfig = AutoConfig.from_pretrained(source, revision=revision)
    return found


def _generation(folder: Path) -> dict[str, Any] | None:
    """What the directory says of writing text: in a file of its own, or among the fields of an old ``config.json``.

    Raises:
        ValueError: The file is damaged.
    """
    file = folder / _GENERATION
    if file.is_file():
        try:
            return dict(json.loads(file.read_text()))
        except ValueError as error:
            raise _damaged(file, error) from error
    found = GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
    return dict(found.to_diff_dict())


def _files(folder: Path, name: str) -> list[Path]:
    """The one file, or those that the index names.

    Raises:
        FileNotFoundError: One of them is missing.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return [folder / name]
    try:
        files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError) as error:
        raise _damaged(index, error) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}, which {folder} does not have. Fetch the rest.")
    return files


def _damaged(file: Path, error: Exception) -> ValueError:
    said = str(error).partition("\n")[0]
    return ValueError(f"{file} cannot be read ({type(error).__name__}: {said}). It is damaged; fetch it again.")


def _from_hub(name: str, revision: str | None) -> Path:
    """Download a model, or find it where it was downloaded to before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    def fetch(weights: str) -> Path:
        base, ending = weights.rsplit(".", 1)
        patterns = ["config.json", _GENERATION, weights, f"{base}-*.{ending}", f"{weights}.index.json"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch(_SAFETENSORS)
        return folder if any(folder.glob("model*.safetensors")) else fetch(_PICKLED)
    except (HFValidationError, OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"{name!r} is no directory here, and the Hugging Face hub did not give it{at}: {error}. Name a directory"
            " with config.json and the weights, or a model of the hub such as 'openai-community/gpt2'."
        ) from error
