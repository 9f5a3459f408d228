"""Weights of transformers' into the shards of a rank, whatever the layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_megatron import groups
from lightning_megatron.checkpoint.comparison import listed
from lightning_megatron.checkpoint.places import places
from lightning_megatron.hf.family import Family, family_of
from lightning_megatron.hf.fields import Fields, UnsupportedConfigError
from lightning_megatron.hf.pieces import Heads, Pieces, Read, Shape, assemble, their_shapes
from lightning_megatron.hf.source import Source


class WeightsError(ValueError):
    """Tensors of a pretrained model that do not fit; nothing was read."""


@dataclass
class Pretrained:
    """A model of transformers, found and understood, whose weights wait until ours is built.

    Args:
        source: Where its tensors are.
        family: Its architecture.
        arguments: Of our configuration.
    """

    source: Source
    family: Family
    arguments: dict[str, Any]

    @classmethod
    def find(cls, source: Source, kind: str, changes: dict[str, Any], ignore: Iterable[str]) -> Pretrained:
        """Read the configuration.

        Args:
            source: Where the model is.
            kind: What it must become, such as "GPT".
            changes: Arguments of our configuration that are to differ.
            ignore: Fields of theirs that change nothing.

        Raises:
            UnsupportedConfigError: There is no counterpart.
        """
        fields = Fields(source.config)
        family = family_of(fields.model_type)
        if family.kind != kind:
            raise UnsupportedConfigError(
                f"{source.name} is a {fields.model_type}, which becomes a {family.kind}Module: use"
                f" {family.kind}Module.from_pretrained, or AutoModule.from_pretrained, not {kind}Module's."
            )
        arguments = family.read_config(fields)
        fields.refuse_unread(ignore)
        return cls(source, family, {**arguments, **changes})

    def check_names(self, config: Any) -> None:
        """Refuse a source that lacks tensors, or has others.

        Args:
            config: Ours, made from ``arguments``.

        Raises:
            WeightsError: Names them.
        """
        wanted = {name for piece in self.family.pieces(config).values() for name in piece.names}
        tied, have = self.family.tied(config), set(self._names(config))
        missing = sorted(name for name in wanted - have if not name.startswith(self.family.head))
        extra = sorted(
            name
            for name in have - wanted - tied.keys()
            if not name.startswith(self.family.head)
            and not any(re.fullmatch(pattern, name) for pattern in self.family.buffers)
        )
        if missing or extra:
            lines = [f"{name} is missing" for name in missing] + [f"{name} has no place in the model" for name in extra]
            raise WeightsError(
                f"{self.source.name} does not hold the tensors of a {self.family.model_type} with its configuration;"
                f" nothing was loaded:\n{listed(lines)}"
            )
        new = sorted(wanted - have)
        if new:
            rank_zero_warn(f"{self.source.name} has no weights for a new head, which starts anew:\n{listed(new)}")

    def new_weights(self, config: Any) -> list[str]:
        """Our names of the tensors that the source does not have, of a new head."""
        have = self._names(config)
        pieces = self.family.pieces(config)
        return sorted(ours for ours, piece in pieces.items() if not all(name in have for name in piece.names))

    def fill(self, module: pl.LightningModule) -> None:
        """Give a built module its weights; each rank reads no more than its shards. All ranks call this.

        Raises:
            WeightsError: A tensor has another shape; on every rank, before any is read.
        """
        have = self._names(module.config)
        shapes = {name: self.source.shapes[mine] for name, mine in have.items()}
        fill(module, self.family.pieces(module.config), shapes, self._reading(have), self.source.name)

    def _reading(self, have: dict[str, str]) -> Read:
        def read(name: str, offset: Shape, sizes: Shape) -> torch.Tensor:
            return self.source.read(have[name], offset, sizes)

        return read

    def _names(self, config: Any) -> dict[str, str]:
        """What the source calls each tensor, by its first name."""
        prefix = self.family.prefix
        if any(name.startswith(prefix) for name in self.source.shapes):
            prefix = ""  # else it is a model without a head, whose names lack it
        have = {name if name.startswith(self.family.head) else prefix + name: name for name in self.source.shapes}
        for second, first in self.family.tied(config).items():
            if second in have:
                have.setdefault(first, have[second])
        return have


def fill(module: Any, pieces: Pieces, shapes: Mapping[str, Shape], read: Read, source: str) -> None:
    """Give a built module's tensors those of theirs that there are; all ranks call this.

    Args:
        module: With its chunks and ``config``.
        pieces: The model's.
        shapes: Of their tensors; of ours, those that lack a part stay as they are.
        read: Reads a rectangle of one of theirs.
        source: What it is called in errors.

    Raises:
        WeightsError: A tensor has another shape; on every rank, before any is read.
    """
    heads, where = Heads.of(module.config), places(module)
    problems = [
        f"{name} has shape {shapes[name]}, and the model wants {shape}"
        for place in where.values()
        if place.key in pieces
        for name, shape in their_shapes(pieces[place.key], place.shape, heads).items()
        if name in shapes and shapes[name] != shape
    ]
    everywhere = groups.gather(problems, groups.on_host())
    if any(everywhere):
        lines = sorted({line for found in everywhere for line in found})
        raise WeightsError(f"{source} does not fit; nothing was loaded:\n{listed(lines)}")
    state = module.state_dict(keep_vars=False)
    with torch.no_grad():
        for name, place in where.items():
            if place.key not in pieces or not all(theirs in shapes for theirs in pieces[place.key].names):
                continue  # a part of a user's own, an update, or a new head
            if place.is_padded:
                state[name].zero_()
            for shard in place.shards(state[name], place.key):
                assemble(pieces[place.key], place.shape, heads, tuple(shard.global_offset), shard.data, read)
