"""Reads transformers' configuration field by field, and names the fields that nothing has read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from transformers import PreTrainedConfig

# Read by transformers' models, and of no effect on their logits: what they are asked to return, how they are begun and
# trained, whose tokens and labels they are of.
_HARMLESS = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
    "decoder_start_token_id", "id2label", "label2id", "num_labels", "problem_type", "dtype", "torch_dtype",
    "name_or_path", "model_type", "transformers_version", "use_cache", "initializer_range", "initializer_factor",
    "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "task_specific_params",
    "pretraining_tp", "classifier_dropout", "gradient_checkpointing", "is_encoder_decoder", "tokenizer_class",
    "attn_implementation", "experts_implementation",
}  # fmt: skip
# Fields that the models look for, whether or not their configuration has them, where they change nothing; the others
# are then None.
_WHERE_UNDEFINED = {"is_causal": True}


class UnsupportedConfigError(ValueError):
    """A configuration that this project's models cannot meet; says which field, and what it holds."""


class Fields:
    """A configuration of transformers.

    Args:
        config: The configuration.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.model_type = str(config.model_type)
        self._read: set[str] = set()

    def __call__(self, name: str) -> Any:
        """The value of a field, which counts as read from now on."""
        self._read.add(name)
        return getattr(self.config, name)

    def must_be(self, name: str, *wanted: Any) -> Any:
        """The field's value, where it is one of the ``wanted``.

        Raises:
            UnsupportedConfigError: The field has another value.
        """
        value = self(name) if hasattr(self.config, name) else wanted[0]
        if value not in wanted:
            raise UnsupportedConfigError(
                f"{self.model_type}: the configuration has {name}={value!r}, for which there is no counterpart here;"
                f" only {' or '.join(f'{name}={choice!r}' for choice in wanted)} is supported."
            )
        return value

    def one_of(self, name: str, choices: dict[Any, Any]) -> Any:
        """What the field's value stands for in ``choices``."""
        return choices[self.must_be(name, *choices)]

    def same(self, *names: str) -> Any:
        """The value that all of these fields have.

        Raises:
            UnsupportedConfigError: They differ.
        """
        values = {name: self(name) for name in names}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{name}={value!r}" for name, value in values.items())
            raise UnsupportedConfigError(
                f"{self.model_type}: the configuration has {told}; here there is one value for all of them. Give it, as"
                " in from_pretrained(..., config={'hidden_dropout': 0.1, 'attention_dropout': 0.1}), after making them"
                " equal in config.json."
            )
        return values[names[0]]

    def unread(self, effective: Collection[str] | None, ignore: Iterable[str] = ()) -> dict[str, Any]:
        """Fields that differ from what the family has by default, that nobody has read, and that change the model.

        Args:
            effective: Fields that transformers' model reads; None: it may be any.
            ignore: Fields that change nothing.
        """
        mine = self.config.to_dict()
        usual = {**_WHERE_UNDEFINED, **type(self.config)().to_dict()}
        known = self._with_other_names(self._read | _HARMLESS | set(ignore) | set(self.config.attribute_map))
        changing = None if effective is None else self._with_other_names(effective)
        return {
            name: value
            for name, value in mine.items()
            if not name.startswith("_")
            and name not in known
            and (changing is None or name in changing)
            and value != usual.get(name)
        }

    def refuse_unread(self, effective: Collection[str] | None, ignore: Iterable[str] = ()) -> None:
        """Refuse what nobody has read, rather than make another model of it; arguments as ``unread``.

        Raises:
            UnsupportedConfigError: Names the fields.
        """
        unread = self.unread(effective, ignore)
        if unread:
            told = ", ".join(f"{name}={value!r}" for name, value in unread.items())
            raise UnsupportedConfigError(
                f"{self.model_type}: the configuration has {told}, for which there is no counterpart here. If it does"
                f" not change the model, say so: from_pretrained(..., ignore={sorted(unread)!r}), or"
                f" lightning-megatron import --ignore {','.join(sorted(unread))}."
            )

    def _with_other_names(self, names: Collection[str]) -> set[str]:
        """The names of fields, and transformers' internal names of the same fields."""
        return {*names, *(self.config.attribute_map.get(name, name) for name in names)}
