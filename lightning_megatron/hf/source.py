"""Where transformers' tensors are read from: files, or a model in memory; a rectangle at a time."""

from __future__ import annotations

import copy
import json
import pickle
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lightning_megatron.hf.pieces import Shape

_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"


class Source:
    """A model of transformers, before any of its weights is read.

    Args:
        name: What to call it in messages.
        config: Its configuration.
    """

    def __init__(self, name: str, config: PreTrainedConfig) -> None:
        self.name = name
        self.config = config

    @property
    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor, by its name."""

    @abstractmethod
    def read(self, name: str, offset: Shape, sizes: Shape) -> torch.Tensor:
        """A rectangle of a tensor; of a file, no more than that is read."""


class InMemory(Source):
    """A model that stands in memory.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]  # which transformers writes only when it saves
        super().__init__(type(model).__name__, config)
        self._tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    @property
    def shapes(self) -> dict[str, Shape]:
        """As ``Source.shapes``."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, offset: Shape, sizes: Shape) -> torch.Tensor:
        """As ``Source.read``."""
        return self._tensors[name][tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]


class PickledFiles(InMemory):
    """``pytorch_model.bin``, in one file or several; mapped into memory, so that only what is used is read.

    Args:
        folder: The directory.
        config: The model's configuration.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        Source.__init__(self, str(folder), config)
        self._tensors = {}
        for file in _files(folder, _PICKLED):
            try:
                self._tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, OSError, pickle.UnpicklingError) as error:
                raise _damaged(file, error) from error


class SafetensorsFiles(Source):
    """``model.safetensors``, in one file or several.

    Args:
        folder: The directory.
        config: The model's configuration.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        super().__init__(str(folder), config)
        self._open: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, Shape] = {}
        for file in _files(folder, _SAFETENSORS):
            opened = self._opened(file)
            for name in opened.keys():  # noqa: SIM118  # it is no dict
                self._where[name] = file
                self._shapes[name] = tuple(opened.get_slice(name).get_shape())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a rank opens its own

    @property
    def shapes(self) -> dict[str, Shape]:
        """As ``Source.shapes``."""
        return self._shapes

    def read(self, name: str, offset: Shape, sizes: Shape) -> torch.Tensor:
        """As ``Source.read``."""
        part = self._opened(self._where[name]).get_slice(name)
        if not offset:
            return part[...]
        return part[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _damaged(file, error) from error
        return self._open[file]


def open_source(source: str | Path | PreTrainedModel) -> Source:
    """A source from what a user names it by.

    Args:
        source: A directory, a model of transformers in memory, or a name on the Hugging Face hub.

    Raises:
        FileNotFoundError: There is no such directory, or none of its files holds weights.
    """
    if isinstance(source, PreTrainedModel):
        return InMemory(source)
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    config = AutoConfig.from_pretrained(folder)
    if (folder / _SAFETENSORS).is_file() or (folder / f"{_SAFETENSORS}.index.json").is_file():
        return SafetensorsFiles(folder, config)
    if (folder / _PICKLED).is_file() or (folder / f"{_PICKLED}.index.json").is_file():
        return PickledFiles(folder, config)
    raise FileNotFoundError(
        f"{folder} holds no weights: neither {_SAFETENSORS} nor {_PICKLED}, nor an index of several such files; it has"
        f" {', '.join(sorted(file.name for file in folder.iterdir())) or 'no files'}."
    )


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


def _from_hub(name: str) -> Path:
    """Download a model, or find it where it was downloaded to before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, "*.bin"]))
    except (HFValidationError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name!r} is no directory here, and the Hugging Face hub did not give it: {error}. Name a directory with"
            " config.json and the weights, or a model of the hub such as 'openai-community/gpt2'."
        ) from error
    return folder
