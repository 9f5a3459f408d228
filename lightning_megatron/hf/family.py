"""``Family``: the base class of one architecture of transformers', and the registry of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError
from lightning_megatron.hf.refused_architectures import why_refused
from lightning_megatron.hf.weight_mapping import WeightMapping, renamed

_ADD_ONE = " To add one, write a subclass of lightning_megatron.hf.Family, under 80 lines; docs/hf.md shows one."
_FAMILIES: dict[str, Family] = {}


class Family:
    """One of transformers' architectures. A subclass with a ``model_type`` is found by it.

    Attributes:
        model_type: transformers' name of the architecture.
        kind: The ``kind`` of the configuration of the module that it becomes, such as "GPT", which ``GPTConfig`` has,
            for a ``GPTModule``.
        prefix: Beginning of the names of all tensors that belong to no head; files of a model without a head leave it
            out.
        other_prefixes: What stands in place of ``prefix`` in classes with some heads.
        buffers: Regular expressions of tensors that are no weights, such as masks that old files hold, beyond those
            that transformers itself leaves out.
        head: Prefixes of their tensors that belong to a task: another task's are left where they are, and those that
            are missing start anew.
        body: Prefixes of the tensors that do not belong to a head, where that is not ``prefix``.
        expresses: Fields of our configuration that few families have (its ``rare`` ones) and this one has.
        heads: By our name of each task that the family has beside others, how the name of transformers' class ends.
        refused_heads: By how the name of a class with another head ends, a sentence on what to do with its models.
        parts: Fields of our configuration that are configurations themselves, such as ``experts``; ``read_config``
            gives their arguments, and a user who changes some keeps the others.
        is_namesake: Whether another family has the same models under another name; a model that was not loaded from
            anywhere is saved as one of that other family.
    """

    model_type: ClassVar[str] = ""
    kind: ClassVar[str] = "GPT"
    prefix: ClassVar[str] = ""
    other_prefixes: ClassVar[tuple[str, ...]] = ()
    buffers: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[tuple[str, ...]] = ()
    body: ClassVar[tuple[str, ...]] = ()
    expresses: ClassVar[tuple[str, ...]] = ()
    heads: ClassVar[Mapping[str, str]] = {}
    refused_heads: ClassVar[Mapping[str, str]] = {}
    parts: ClassVar[tuple[str, ...]] = ()
    is_namesake: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "pieces"):
            raise TypeError(f"{cls.__name__}.pieces is weight_mapping now: rename the method.")
        if "model_type" in vars(cls):
            _FAMILIES[cls.model_type] = cls()

    def read_config(self, fields: Fields) -> dict[str, Any]:
        """Translate transformers' configuration into arguments of ours.

        Raises:
            UnsupportedConfigError: A field has a value for which there is no counterpart.
        """
        raise NotImplementedError

    def read(self, fields: Fields, task: str | None = None) -> dict[str, Any]:
        """``read_config``, and what the configuration says of the head.

        Args:
            fields: transformers' configuration.
            task: The task that a user asks for, where it is not to be the one of the configuration.

        Raises:
            UnsupportedConfigError: A field has a value, or a task is asked for, for which there is no counterpart.
        """
        return {**self.read_config(fields), **self.read_head(fields, task)}

    def read_head(self, fields: Fields, task: str | None) -> dict[str, Any]:
        """Arguments of our configuration that are about the head; see ``read``."""
        if task not in (None, "causal_lm") and not self.heads:
            raise UnsupportedConfigError(
                f"config={{'task': {task!r}}}: {type(self).__name__} has no heads beside its own. Make it a subclass of"
                " lightning_megatron.hf.families.causal.Causal; docs/hf.md says how."
            )
        return {}

    def write_config(self, config: Any) -> dict[str, Any]:
        """Translate our configuration into fields of transformers'.

        Raises:
            UnsupportedConfigError: The family has no such model.
        """
        raise NotImplementedError

    def write_head(self, config: Any) -> dict[str, Any]:
        """Fields of transformers' that are about the head.

        Raises:
            UnsupportedConfigError: The family has no such head.
        """
        return {}

    def written(self, config: Any) -> dict[str, Any]:
        """``write_config`` and ``write_head``, where the family ``expresses`` all that the configuration has.

        Raises:
            UnsupportedConfigError: The family has no such model.
        """
        expressed = (*self.expresses, "task") if self.heads else self.expresses
        for name in getattr(config, "rare", ()):
            if name not in expressed:
                self._require(config, **{name: (getattr(type(config), name),)})
        return {**self.write_config(config), **self.write_head(config)}

    def weight_mapping(self, config: Any) -> WeightMapping:
        """Return our name of each tensor of the model, and the tensors of transformers' that it is made of."""
        raise NotImplementedError

    def prefix_of(self, config: Any) -> str:
        """``prefix``, or what stands in its place in the class with the configuration's head."""
        return self.prefix

    def names(self, config: Any) -> WeightMapping:
        """``weight_mapping`` with the names of the class that has the configuration's head."""
        mapping, prefix = self.weight_mapping(config), self.prefix_of(config)
        if prefix == self.prefix:
            return mapping
        return {ours: renamed(mapped, self.prefix, prefix) for ours, mapped in mapping.items()}

    def architecture(self, config: Any) -> str:
        """The class of transformers that the exported model is."""
        raise NotImplementedError

    def tied(self, config: Any) -> dict[str, str]:
        """Second names of theirs for tensors that the model holds once, and the first ones.

        That is the output layer's of a model whose embeddings are tied; a subclass says where there are others.
        """
        embedding = self.names(config).get("embedding.word_embeddings.weight")
        ties = getattr(config, "tie_embeddings", False) and embedding is not None
        return {"lm_head.weight": embedding.names[0]} if ties and embedding is not None else {}

    def left_out(self, name: str, config: Any) -> str:
        """What a tensor of theirs belongs to, in words, where the module has no such part and leaves it out."""
        return ""

    def architectures(self, config: Any) -> tuple[str, ...]:
        """The classes of transformers, each with another head, that a model of our type of configuration may be."""
        return (self.architecture(config),)

    def has_head(self, name: str) -> bool:
        """Whether a tensor of theirs belongs to a head."""
        return name.startswith(self.head) or not name.startswith(self.body or (self.prefix, *self.other_prefixes))

    def _require(self, config: Any, **wanted: Any) -> None:
        """Refuse to write a configuration that the family cannot express.

        Raises:
            UnsupportedConfigError: Names the field and the values that it may have.
        """
        for name, choices in wanted.items():
            value = getattr(config, name)
            if value not in choices:
                raise UnsupportedConfigError(
                    f"{type(config).__name__}({name}={value!r}) cannot be saved as a {self.model_type}, which has only"
                    f" {' or '.join(map(repr, choices))}."
                )


def known_families() -> dict[str, Family]:
    """All families, also the user's own, by transformers' ``model_type``."""
    return dict(sorted(_FAMILIES.items()))


def family_of(model_type: str) -> Family:
    """The family of that name.

    Raises:
        UnsupportedConfigError: There is none; names those that there are, and how to add one.
    """
    known = known_families()
    if model_type not in known:
        raise UnsupportedConfigError(
            f"model_type {model_type!r} is not among the families that can be loaded: {', '.join(known)}."
            + (why_refused(model_type) or _ADD_ONE)
        )
    return known[model_type]


def kind_of(config: Any) -> str:
    """The kind of model that a configuration, or its type, is of; a subclass of a user's is of its base's."""
    return getattr(config, "kind", "")


def family_for(config: Any) -> Family:
    """The first family that can express ``config``, and is no namesake.

    Raises:
        UnsupportedConfigError: None can; says why, family by family.
    """
    reasons = []
    for family in sorted(known_families().values(), key=lambda family: family.is_namesake):
        if family.kind == kind_of(config):
            try:
                family.written(config)
                return family
            except UnsupportedConfigError as error:
                reasons.append(str(error))
    raise UnsupportedConfigError(
        "No family of transformers has such a model:\n" + "\n".join(f"  - {reason}" for reason in reasons)
    )
