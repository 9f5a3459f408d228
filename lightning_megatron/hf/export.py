"""Exports a module or a checkpoint to a directory that transformers loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_megatron.checkpoint import consolidate
from lightning_megatron.hf.config_reader import UnsupportedConfigError
from lightning_megatron.hf.family import Family, family_for, family_of, kind_of
from lightning_megatron.hf.gather import WholeTensors, on_first_rank
from lightning_megatron.hf.meta_model import MetaModel
from lightning_megatron.hf.original_settings import Origin
from lightning_megatron.hf.pretrained_directory import Directory, Kinds, Updates, in_bytes, their_config
from lightning_megatron.hf.weight_mapping import Heads, WeightMapping, is_update


@dataclass(frozen=True)
class Target:
    """How a model is saved for transformers.

    Args:
        family: The architecture of transformers.
        config: Our configuration.
        origin: Settings of the pretrained model.
        dtype: Type of the weights; None: the type in which each was stored, or else the model's own.
        max_shard_size: Largest number of bytes of a file.
        tokenizer: A tokenizer that is saved too, or None.
        updates: Low-rank updates that are added to the weights, or None.
    """

    family: Family
    config: Any
    origin: Origin
    dtype: torch.dtype | None
    max_shard_size: int
    tokenizer: Any
    updates: Updates | None = None

    @classmethod
    def choose(
        cls,
        config: Any,
        origin: Origin,
        family: str | None,
        dtype: torch.dtype | str | None,
        max_shard_size: int | str,
        tokenizer: Any,
        updates: Callable[[WeightMapping], Updates] | None = None,
    ) -> Target:
        """Find the family, and check all that can be checked before anything is written.

        Args:
            config: Our configuration.
            origin: Settings of the pretrained model.
            family: transformers' ``model_type``, if the user named it.
            dtype: Type of the weights, or its name.
            max_shard_size: Largest size of a file, such as "5GB".
            tokenizer: A tokenizer that is saved too, or None.
            updates: Makes the low-rank updates that are added to the weights, from the model's mapping; or None.

        Raises:
            UnsupportedConfigError: The family has no such model.
            ValueError: A type or size that is none.
        """
        name = family or (origin.config or {}).get("model_type")
        found = family_of(name) if name else family_for(config)
        if found.kind != kind_of(config):
            raise UnsupportedConfigError(
                f"A {kind_of(config)} cannot be saved as a {found.model_type}, which is a {found.kind}."
            )
        if isinstance(dtype, str):
            named = getattr(torch, dtype, None)
            if not isinstance(named, torch.dtype) or not named.is_floating_point:
                raise ValueError(f"dtype={dtype!r}: use 'float32', 'bfloat16' or 'float16'.")
            dtype = named
        if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
            raise TypeError(f"tokenizer={tokenizer!r} has no save_pretrained: use a tokenizer of transformers'.")
        found.written(config)
        low_rank = updates and updates(found.names(config))
        return cls(found, config, origin, dtype, in_bytes(max_shard_size), tokenizer, low_rank)

    def write_module(self, path: Path, module: pl.LightningModule) -> Path:
        """Write the directory from the shards of all ranks.

        Raises:
            RuntimeError: The first rank could not write; on every rank.
        """
        tensors = WholeTensors(module, first=is_update)
        left = iter(tensors)

        def write() -> None:
            try:
                self._write(path, tensors.kinds, left)
            finally:
                _exhaust(left)  # what the others send is taken to its end even if that fails

        on_first_rank(path, write, beside=lambda: _exhaust(left))
        return path

    def write_checkpoint(self, path: Path, checkpoint: Path) -> Path:
        """Write the directory from a checkpoint that is whole, on one process, holding one tensor at a time."""
        kinds = consolidate.shapes_and_dtypes(checkpoint)
        updates = {key for key in kinds if is_update(key)}
        first, rest = (
            consolidate.tensors(checkpoint, only=updates),
            consolidate.tensors(checkpoint, only=kinds.keys() - updates),
        )
        self._write(path, kinds, chain(first if updates else (), rest))
        return path

    def _write(self, path: Path, kinds: Kinds, tensors: Iterable[tuple[str, Any]]) -> None:
        mapping = self.family.names(self.config)
        kinds = {key: kind for key, kind in kinds.items() if key in mapping}
        architecture = self.family.architecture(self.config)
        meta_model = MetaModel(their_config(self.family, self.config, self.origin.config, torch.float32), architecture)
        directory = Directory(
            path,
            mapping,
            Heads.of(self.config),
            kinds,
            lambda name, own: self.dtype or self.origin.dtype_of(name, own),
            meta_model.stored_places,
            self.max_shard_size,
            self.updates,
        )
        usual = Counter(directory.dtypes.values()).most_common(1)[0][0]
        config = their_config(self.family, self.config, self.origin.config, usual)
        try:
            for key, tensor in tensors:
                if key in mapping:
                    directory.write(key, tensor)
                elif is_update(key) and self.updates is not None:
                    self.updates.take(key, tensor)
            directory.finish(config, self.origin.generation, self.tokenizer)
        except BaseException:
            directory.abandon()
            raise


def _exhaust(tensors: Iterator[Any]) -> None:
    for _ in tensors:
        pass
