"""Loads transformers' weights into the shards of a rank, under any layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import MODEL_MAPPING

from lightning_megatron.checkpoint.mismatches import as_list
from lightning_megatron.checkpoint.tensor_shards import shard_specs
from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError
from lightning_megatron.hf.expert_matrices import StackedExperts
from lightning_megatron.hf.family import Family, family_of
from lightning_megatron.hf.file_places import Place
from lightning_megatron.hf.meta_model import MetaModel, class_named
from lightning_megatron.hf.original_settings import Origin
from lightning_megatron.hf.weight_mapping import Heads, Read, Shape, WeightMapping, assemble, their_shapes
from lightning_megatron.hf.weight_source import Source


class WeightsError(ValueError):
    """Tensors of a pretrained model that do not fit; nothing was read."""


@dataclass
class Pretrained:
    """A model of transformers whose configuration is read, and whose weights are read once our model is built.

    Args:
        source: The source of its tensors.
        fields: transformers' configuration of the model.
        family: The model's architecture.
        changes: Arguments of our configuration that differ.
        ignore: Fields of theirs that change nothing.

    Attributes:
        names: The source's name of each tensor, by transformers' first name of it; filled by ``check``.
    """

    source: Source
    fields: Fields
    family: Family
    changes: dict[str, Any]
    ignore: tuple[str, ...]
    names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, source: Source, kind: str, changes: dict[str, Any], ignore: Iterable[str]) -> Pretrained:
        """Read the architecture.

        Args:
            source: The source of the model.
            kind: Kind of module that it must become, such as "GPT".
            changes: Arguments of our configuration that are to differ.
            ignore: Fields of theirs that change nothing; "architectures" leaves a head out.

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
        return cls(source, fields, family, changes, tuple(ignore))

    def arguments(self) -> dict[str, Any]:
        """Arguments of our configuration.

        Raises:
            UnsupportedConfigError: A field of theirs has a value for which there is no counterpart.
        """
        found = self.family.read(self.fields, self.changes.get("task"))
        for name, change in self.changes.items():
            of_a_part = name in self.family.parts and isinstance(change, dict)
            found[name] = {**found[name], **change} if of_a_part else change
        return found

    def check(self, config: Any) -> None:
        """Refuse what would not be the same model, before a weight is read.

        Args:
            config: Ours, made from ``arguments``.

        Raises:
            UnsupportedConfigError: A head, or a field that changes the model, has no counterpart.
            WeightsError: Tensors are missing, or belong to no part of the model.
        """
        self._check_head(config)
        meta_model = MetaModel(self.source.config, self.family.architecture(config))
        self.fields.refuse_unread(meta_model.fields_read, self.ignore)
        places = meta_model.places(self.source.shapes)
        if any(place.expert is not None for place in places.values()):
            self.source = StackedExperts(self.source, places)
        self.names = self._found_names(config, places)
        self._check_names(config, meta_model)
        self._check_ties(config)

    def new_weights(self, config: Any) -> list[str]:
        """Our names of the tensors that the source does not have, of a new head."""
        mapping = self.family.names(config)
        return sorted(ours for ours, mapped in mapping.items() if not all(name in self.names for name in mapped.names))

    def origin(self) -> Origin:
        """The settings that an export writes again beside the weights."""
        dtypes = {name: self.source.dtypes[stored] for name, stored in self.names.items()}
        return Origin(self.source.config.to_dict(), self.source.generation, dtypes)

    def fill(self, module: pl.LightningModule) -> None:
        """Give a built module its weights; each rank reads no more than its shards. All ranks call this.

        Raises:
            WeightsError: A tensor has another shape; on every rank, before any is read.
        """
        shapes = {name: self.source.shapes[stored] for name, stored in self.names.items()}

        def read(name: str, offset: Shape, sizes: Shape) -> torch.Tensor:
            return self.source.read(self.names[name], offset, sizes)

        fill(module, self.family.names(module.config), shapes, read, self.source.name)

    @property
    def _architecture(self) -> type | None:
        """transformers' class that the configuration names, if it names one of its own."""
        named = self.source.config.architectures or [""]
        found = class_named(str(named[0]))
        return found if found is not None and found.config_class is type(self.source.config) else None

    @property
    def _leaves_head(self) -> bool:
        """Whether the user leaves the source's head out."""
        return "architectures" in self.ignore or "task" in self.changes

    @property
    def _takes_new_head(self) -> bool:
        """Whether a head may start anew: the source is a model without one, or its head is left out."""
        base = MODEL_MAPPING.get(type(self.source.config), None)
        return self._leaves_head or (base is not None and self._architecture is base)

    def _check_head(self, config: Any) -> None:
        found, known = self._architecture, self.family.architectures(config)
        if found is None or self._takes_new_head or found.__name__ in known:
            return
        held = ", ".join(sorted({name.partition(".")[0] for name in self.source.shapes if self.family.has_head(name)}))
        remedy = (
            "config={'task': ...}" if hasattr(config, "task") else "ignore=['architectures'] (the command: --ignore)"
        )
        advice = "".join(
            f" {text}" for ending, text in self.family.refused_heads.items() if found.__name__.endswith(ending)
        )
        raise UnsupportedConfigError(
            f"{self.source.name} is a {found.__name__}, whose head {f'({held}) ' if held else ''}has no"
            f" counterpart here: a {self.family.kind}Module is a {' or '.join(known)}. To load the rest without that"
            f" head, use from_pretrained(..., {remedy}); a head that the files do not have starts anew.{advice}"
        )

    def _found_names(self, config: Any, places: Mapping[str, Place]) -> dict[str, str]:
        family, prefix = self.family, self.family.prefix_of(config)
        known = (family.prefix, *family.other_prefixes)
        is_headless = not any(name.startswith(known) for name in self.source.shapes)  # whose names have no prefix
        have = {}
        for stored in self.source.shapes:
            name = places[stored].name if stored in places else stored
            beginning = next((each for each in known if name.startswith(each)), None)
            if beginning is not None:
                name = prefix + name.removeprefix(beginning)
            elif is_headless and not name.startswith(family.head):
                name = prefix + name
            have[name] = stored
        for second, first in family.tied(config).items():
            if second in have:
                have.setdefault(first, have[second])
        return have

    def _check_names(self, config: Any, meta_model: MetaModel) -> None:
        family, have = self.family, set(self.names)
        wanted = {name for mapped in family.names(config).values() for name in mapped.names}
        missing = sorted(
            name
            for name in wanted - have
            if not (name.startswith(family.head) or (self._takes_new_head and family.has_head(name)))
        )
        extra = sorted(
            name
            for name in have - wanted - family.tied(config).keys() - meta_model.ignored(have - wanted)
            if not name.startswith(family.head)
            and not (self._leaves_head and family.has_head(name))
            and not any(re.fullmatch(pattern, name) for pattern in family.buffers)
            and not family.left_out(name, config)
        )
        lacking = self.source.missing if isinstance(self.source, StackedExperts) else []
        if missing or extra or lacking:
            lines = [f"{name} is missing" for name in missing] + lacking
            lines += [f"{name} belongs to no part of the model" for name in extra]
            raise WeightsError(
                f"{self.source.name} does not hold the tensors of a {family.model_type} with its configuration;"
                f" nothing was loaded:\n{as_list(lines)}"
            )
        left_out = Counter(what for name in have - wanted if (what := family.left_out(name, config)))
        for what, count in left_out.items():
            rank_zero_warn(
                f"{self.source.name}: {count} tensors are left out, those of {what}, which no {family.kind}Module has."
                " An export has none either."
            )
        new = sorted(wanted - have)
        if new:
            rank_zero_warn(f"{self.source.name} has no weights for a new head, which starts anew:\n{as_list(new)}")

    def _check_ties(self, config: Any) -> None:
        """transformers does not tie weights that the files hold with different values; here a tie is the model's."""
        for second, first in self.family.tied(config).items():
            if second in self.names and not self.source.equal(self.names[first], self.names[second]):
                untied = " To load both, use from_pretrained(..., config={'tie_embeddings': False})."
                raise WeightsError(
                    f"{self.source.name} holds {first} and {second} with different values, and its configuration says"
                    f" that they are one.{untied if self.family.kind == 'GPT' else ''}"
                )


def fill(module: Any, mapping: WeightMapping, shapes: Mapping[str, Shape], read: Read, source: str) -> None:
    """Give a built module's tensors those of theirs that there are; all ranks call this.

    Args:
        module: The module, whose chunks are built.
        mapping: transformers' tensors that each of our tensors is made of.
        shapes: Shapes of transformers' tensors; our tensors that lack a part of theirs stay as they are.
        read: Reads a rectangle of one of transformers' tensors.
        source: Name of the source in errors.

    Raises:
        WeightsError: A tensor has another shape; on every rank, before any is read.
    """
    heads, where = Heads.of(module.config), shard_specs(module)
    problems = [
        f"{name} has shape {shapes[name]}, and the model wants {shape}"
        for spec in where.values()
        if spec.key in mapping
        for name, shape in their_shapes(mapping[spec.key], spec.shape, heads).items()
        if name in shapes and shapes[name] != shape
    ]
    everywhere = collectives.gather(problems, process_groups.gloo_world())
    if any(everywhere):
        lines = sorted({line for found in everywhere for line in found})
        raise WeightsError(f"{source} does not fit; nothing was loaded:\n{as_list(lines)}")
    state = module.state_dict(keep_vars=False)
    with torch.no_grad():
        for name, spec in where.items():
            if spec.key not in mapping or not all(theirs in shapes for theirs in mapping[spec.key].names):
                continue  # a part of a user's own, an update, or a new head
            if spec.is_padded:
                state[name].zero_()
            for shard in spec.shards(state[name], spec.key):
                assemble(mapping[spec.key], spec.shape, heads, tuple(shard.global_offset), shard.data, read)
