"""Writes a directory that transformers loads, tensor by tensor."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from lightning_megatron.checkpoint import safetensors_writer
from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.family import Family
from lightning_megatron.hf.file_places import Place
from lightning_megatron.hf.meta_model import class_named
from lightning_megatron.hf.weight_mapping import Heads, Shape, WeightMapping, take_apart, their_shapes

_INDEX = "model.safetensors.index.json"
_OWN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# huggingface_hub shares the tensors out over files. Sizes are read here, since it reads no "5GiB", which transformers
# takes.
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([KMGT]?)(I?)B)?")


class Updates(Protocol):
    """Low-rank updates of a whole model."""

    def take(self, key: str, tensor: torch.Tensor) -> None:
        """Keep a tensor of an update."""

    def merge(self, theirs: dict[str, torch.Tensor], transposed: bool) -> None:
        """Add the updates to weights of transformers', in place."""


Kinds = safetensors_writer.Kinds


def in_bytes(size: int | str) -> int:
    """Bytes of a size such as "5GB", "1.5GB" or "5GiB".

    Raises:
        ValueError: The text is no size.
    """
    found = _SIZE.fullmatch(str(size).strip().upper())
    number, unit, binary = found.groups() if found else ("0", None, None)
    found_bytes = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1 if unit else 0))
    if found_bytes < 1:
        raise ValueError(f"max_shard_size={size!r}: use bytes, or a size such as '5GB', '1.5GB', '200MB' or '5GiB'.")
    return found_bytes


def their_config(family: Family, config: Any, base: dict[str, Any] | None, dtype: torch.dtype) -> PreTrainedConfig:
    """transformers' configuration of our model.

    Args:
        family: The model's architecture.
        config: Our configuration.
        base: transformers' configuration of the pretrained model, if there is one: names of labels, token ids, ...
        dtype: Type of the weights.

    Raises:
        UnsupportedConfigError: The family has no such model.
    """
    known = {name: value for name, value in (base or {}).items() if name not in ("model_type", "transformers_version")}
    fields = {**known, **family.written(config)}
    if "num_labels" in fields and len(known.get("id2label", ())) == fields["num_labels"]:
        fields.pop("num_labels")  # it would number the labels anew
    elif "num_labels" in fields:
        fields = {name: value for name, value in fields.items() if name not in ("id2label", "label2id")}
    longest = "max_position_embeddings"
    if getattr(config, "position_embedding", None) == "rope" and known.get(longest):
        fields[longest] = max(known[longest], fields[longest])  # trained on shorter texts, it still knows longer ones
    fields |= {"architectures": [family.architecture(config)], "dtype": str(dtype).removeprefix("torch.")}
    return AutoConfig.for_model(family.model_type, **_as_it_came(family, fields, known))


def _as_it_came(family: Family, fields: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The fields, each as it came, or absent as it was, where that means the same."""

    def meaning(fields: dict[str, Any]) -> Any:
        return family.read(Fields(AutoConfig.for_model(family.model_type, **fields)))

    names = sorted((fields.keys() if known else set()) - {"architectures", "dtype"})
    for name in 2 * names:  # once more, since some mean the same only together
        if name not in known or fields[name] != known[name]:
            came = {key: value for key, value in fields.items() if key != name}
            came |= {name: known[name]} if name in known else {}
            with suppress(ValueError, TypeError):
                fields = came if meaning(came) == meaning(fields) else fields
    return fields


class Directory:
    """A pretrained model's directory, visible under its name when all of it is there.

    Args:
        path: The directory.
        mapping: transformers' tensors that each of our tensors is made of.
        heads: The attention heads of the model.
        kinds: Shape and type of each of our tensors.
        dtype: Chooses the type of one of theirs, from its name and the type of ours.
        stored_places: Returns the names of tensors in files, and which tensor of transformers' each is or is a part of;
            from the shapes of these.
        max_shard_size: Largest number of bytes of a file of weights; one tensor may be larger.
        updates: Low-rank updates that are added to the weights; or None.
    """

    def __init__(
        self,
        path: Path,
        mapping: WeightMapping,
        heads: Heads,
        kinds: Kinds,
        dtype: Callable[[str, torch.dtype], torch.dtype],
        stored_places: Callable[[Mapping[str, Shape]], dict[str, Place]],
        max_shard_size: int,
        updates: Updates | None = None,
    ) -> None:
        self.path = path
        self._updates = updates
        self.folder = path.with_name(f".{path.name}.unfinished")
        self._mapping, self._heads = mapping, heads
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        theirs = {
            name: (shape, dtype(name, own))
            for key, (whole, own) in kinds.items()
            for name, shape in their_shapes(mapping[key], whole, heads).items()
        }
        places = stored_places({name: shape for name, (shape, _) in theirs.items()})
        self._parts: dict[str, list[tuple[str, Place]]] = {}
        stored = {}
        for name, place in sorted(places.items(), key=lambda each: _in_order(each[1])):
            shape, kind = theirs[place.name]
            self._parts.setdefault(place.name, []).append((name, place))
            stored[name] = (place.shape(shape), kind)
        split = split_state_dict_into_shards_factory(
            stored,
            get_storage_size=lambda kind: math.prod(kind[0]) * kind[1].itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self.dtypes = {name: kind for name, (_, kind) in theirs.items()}
        self._files: dict[str, safetensors_writer.SafetensorsFile] = {}
        for name, shard in split.filename_to_tensors.items():
            file = safetensors_writer.SafetensorsFile(self.folder / name, {tensor: stored[tensor] for tensor in shard})
            self._files |= dict.fromkeys(shard, file)
        if split.is_sharded:
            parameters = sum(math.prod(shape) for shape, _ in stored.values())
            metadata = {"total_parameters": parameters, **split.metadata}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            (self.folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write(self, key: str, ours: torch.Tensor) -> None:
        """Write their tensors that one of ours is made of; updates come before what they update."""
        mapped = self._mapping[key]
        theirs = take_apart(mapped, ours, self._heads)
        if self._updates is not None:
            self._updates.merge(theirs, mapped.transposed)
        for name, tensor in theirs.items():
            for stored, place in self._parts[name]:
                self._files[stored].write(stored, place.cut(tensor).to(self.dtypes[name]))

    def finish(self, config: PreTrainedConfig, generation: dict[str, Any] | None, tokenizer: Any) -> None:
        """Write what is beside the weights, and give the directory its name.

        Args:
            config: transformers' configuration.
            generation: The pretrained model's ``generation_config.json``; None: one is made of the configuration.
            tokenizer: A tokenizer that is saved too, or None.
        """
        self._close()
        config.save_pretrained(self.folder)
        architecture = class_named(str((config.architectures or [""])[0]))
        writes_text = architecture is None or architecture.can_generate()
        if (
            generation is not None and writes_text
        ):  # as it is: transformers would refuse to write what some models of the hub have
            text = json.dumps(generation, indent=2, sort_keys=True, ensure_ascii=False)
            (self.folder / "generation_config.json").write_text(f"{text}\n")
        elif writes_text:
            GenerationConfig.from_model_config(config).save_pretrained(self.folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.folder)
        if self.path.exists():  # written by an earlier call
            for file in self.path.iterdir():
                if _OWN_FILES.fullmatch(file.name):
                    file.unlink()
            for file in self.folder.iterdir():
                file.replace(self.path / file.name)
            self.folder.rmdir()
        else:
            self.folder.rename(self.path)

    def abandon(self) -> None:
        """Remove what was written, after an error."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _close(self) -> None:
        for file in set(self._files.values()):
            file.close()


def _in_order(place: Place) -> Any:
    """A sorting key that is transformers' order: by the model's names, numbers as numbers; the gates of all experts."""
    name = [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in place.name.split(".")]
    return name, place.part, -1 if place.expert is None else place.expert
