"""A directory that transformers loads, written tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from lightning_megatron.checkpoint import safetensors_file
from lightning_megatron.hf.family import Family
from lightning_megatron.hf.pieces import Heads, Pieces, take_apart, their_shapes

_INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Updates(Protocol):
    """Low-rank updates of a whole model."""

    def take(self, key: str, tensor: torch.Tensor) -> None:
        """Keep a tensor of an update."""

    def merge(self, theirs: dict[str, torch.Tensor], transposed: bool) -> None:
        """Add the updates to weights of transformers', in place."""


Kinds = safetensors_file.Kinds


def in_bytes(size: int | str) -> int:
    """Bytes of a size such as "5GB".

    Raises:
        ValueError: It is none.
    """
    text = str(size).strip().upper()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), None)
    number = text[:-2] if unit else text
    if not number.isdigit() or not int(number):
        raise ValueError(f"max_shard_size={size!r}: use bytes, or a size such as '5GB' or '200MB'.")
    return int(number) * _UNITS.get(unit or "", 1)


def their_config(family: Family, config: Any, base: dict[str, Any] | None, dtype: torch.dtype) -> PreTrainedConfig:
    """transformers' configuration of our model.

    Args:
        family: Its architecture.
        config: Ours.
        base: What the model came with, where it came from transformers: names of labels, token ids, ...
        dtype: Of the weights.

    Raises:
        UnsupportedConfigError: The family has no such model.
    """
    known = {name: value for name, value in (base or {}).items() if name not in ("model_type", "transformers_version")}
    fields = {**known, **family.write_config(config)}
    if "num_labels" in fields and len(known.get("id2label", ())) == fields["num_labels"]:
        fields.pop("num_labels")  # it would number the labels anew
    elif "num_labels" in fields:
        fields = {name: value for name, value in fields.items() if name not in ("id2label", "label2id")}
    longest = "max_position_embeddings"
    if getattr(config, "position_embedding", None) == "rope" and known.get(longest):
        fields[longest] = max(known[longest], fields[longest])  # trained on shorter texts, it still knows longer ones
    fields |= {"architectures": [family.architecture(config)], "dtype": str(dtype).removeprefix("torch.")}
    return AutoConfig.for_model(family.model_type, **fields)


class Directory:
    """A pretrained model's directory, visible under its name when all of it is there.

    Args:
        path: Of the directory.
        pieces: What each of our tensors is made of.
        heads: The model's.
        kinds: Shape and type of each of our tensors.
        dtype: What to write; None keeps each tensor's.
        max_shard_size: Most bytes of a file of weights, unless one tensor is larger.
        updates: Of the weights, added to them on the way; or None.
    """

    def __init__(
        self,
        path: Path,
        pieces: Pieces,
        heads: Heads,
        kinds: Kinds,
        dtype: torch.dtype | None,
        max_shard_size: int,
        updates: Updates | None = None,
    ) -> None:
        self.path = path
        self._updates = updates
        self.folder = path.with_name(f".{path.name}.unfinished")
        self._pieces, self._heads = pieces, heads
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        theirs = {
            name: (shape, dtype or own)
            for key, (whole, own) in kinds.items()
            for name, shape in their_shapes(pieces[key], whole, heads).items()
        }
        self._dtypes = {name: kind for name, (_, kind) in theirs.items()}
        self._files: dict[str, safetensors_file.SafetensorsFile] = {}
        shards = _shards(theirs, max_shard_size)
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = safetensors_file.SafetensorsFile(self.folder / name, shard)
            self._files |= dict.fromkeys(shard, file)
            if len(shards) > 1:
                self._index(name, shard)

    def write(self, key: str, ours: torch.Tensor) -> None:
        """Write their tensors that one of ours is made of; updates come before what they update."""
        piece = self._pieces[key]
        theirs = take_apart(piece, ours, self._heads)
        if self._updates is not None:
            self._updates.merge(theirs, piece.transposed)
        for name, tensor in theirs.items():
            self._files[name].write(name, tensor.to(self._dtypes[name]))

    def finish(self, config: PreTrainedConfig, tokenizer: Any) -> None:
        """Write what is beside the weights, and give the directory its name."""
        self._close()
        config.save_pretrained(self.folder)
        if "ForCausalLM" in str(config.architectures) or "ForConditional" in str(config.architectures):
            GenerationConfig.from_model_config(config).save_pretrained(self.folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.folder)
        if self.path.exists():  # written by an earlier call
            for file in self.path.glob("model*.safetensors*"):
                file.unlink()
            for file in self.folder.iterdir():
                file.replace(self.path / file.name)
            self.folder.rmdir()
        else:
            self.folder.rename(self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _close(self) -> None:
        for file in set(self._files.values()):
            file.close()

    def _index(self, file: str, names: Iterable[str]) -> None:
        path = self.folder / _INDEX
        index = json.loads(path.read_text()) if path.is_file() else {"metadata": {"total_size": 0}, "weight_map": {}}
        index["weight_map"] |= dict.fromkeys(names, file)
        index["metadata"]["total_size"] += (self.folder / file).stat().st_size
        path.write_text(json.dumps(index, indent=2))


def _shards(kinds: Kinds, most: int) -> list[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """The tensors in as few files as ``most`` bytes each allow, in their order."""
    shards: list[dict[str, Any]] = [{}]
    held = 0
    for name, kind in kinds.items():
        size = safetensors_file.size(*kind)
        if shards[-1] and held + size > most:
            shards.append({})
            held = 0
        shards[-1][name] = kind
        held += size
    return shards
