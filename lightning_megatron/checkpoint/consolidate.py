"""Merges a sharded checkpoint into one file on one process, tensor by tensor, so that memory stays small."""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch

from lightning_megatron.checkpoint import manifest, mismatches, safetensors_writer, shard_reader, trainer_state, writing
from lightning_megatron.checkpoint.manifest import CheckpointError

SUFFIXES = (".safetensors", ".ckpt", ".pt")
_MODEL = "model."


def export(checkpoint: str | Path, out: str | Path) -> Path:
    """Merge the weights of a checkpoint into one file, under the whole model's names.

    Args:
        checkpoint: The directory of the checkpoint.
        out: A ``.safetensors`` file, written tensor by tensor; or a ``.ckpt`` or ``.pt`` file as Lightning writes it on
            one process, for ``load_from_checkpoint`` of a plain LightningModule, which is held in memory.

    Returns:
        The file.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged.
        ValueError: The suffix of ``out`` names no format.
    """
    path, out = Path(checkpoint), Path(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: use the suffix .safetensors, or .ckpt for Lightning's load_from_checkpoint.")
    verified_manifest(path)
    unfinished = out.with_name(f".{out.name}.unfinished")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if out.suffix == ".safetensors":
            safetensors_writer.write(unfinished, shapes_and_dtypes(path), tensors(path))
        else:
            torch.save({**state_of(path, trust=False), "state_dict": dict(tensors(path))}, unfinished)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return out


def verified_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking that all files are as they were written.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged.
    """
    about = manifest.read(path)
    wrong = manifest.find_damage(path, about, sorted(about["files"]), checksums=True)
    if wrong:
        raise CheckpointError(f"{path} is damaged:\n{mismatches.as_list(wrong)}")
    return about


def state_of(path: Path, trust: bool) -> dict[str, Any]:
    """Read Lightning's state from a checkpoint, without the tensors of the model."""
    objects = path / trainer_state.OBJECTS
    content = objects.read_bytes() if objects.is_file() else None
    names = manifest.read(path)["objects"]
    return trainer_state.join((path / trainer_state.STATE).read_bytes(), content, names, trust)


def tensors(path: Path, prefer_main: bool = False, only: Set[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the whole model's tensors, one after the other.

    Args:
        path: The directory of the checkpoint.
        prefer_main: Whether to read the fp32 main weights of a run in low precision in place of its weights.
        only: The names of the tensors to read; None reads all.
    """
    reader = shard_reader.WholeTensorReader(path / writing.WEIGHTS)
    for key in sorted(reader.stored):
        name = key.removeprefix(_MODEL)
        if key.startswith(_MODEL) and (only is None or name in only):
            main = f"optimizer.main_weight.{name}"
            yield name, reader.read(main if prefer_main and main in reader.stored else key)


def shapes_and_dtypes(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of the whole model's tensors, in the order of ``tensors``."""
    stored = shard_reader.stored(path / writing.WEIGHTS)
    return {
        key.removeprefix(_MODEL): (tuple(about.size), about.properties.dtype)
        for key, about in sorted(stored.items())
        if key.startswith(_MODEL)
    }


def optimized(path: Path) -> set[str]:
    """The names of the whole model's tensors that the optimizer has states of; empty where it was not saved."""
    stored = shard_reader.stored(path / writing.WEIGHTS)
    states = (key.split(".", 2) for key in stored if key.startswith("optimizer."))
    return {parts[2] for parts in states if len(parts) == 3}
