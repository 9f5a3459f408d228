"""The fields of megatron-core's ``TransformerConfig``, read from its source: to import it takes seconds."""

from __future__ import annotations

import ast
from functools import cache

from lightning_megatron.distributed.signatures import arguments_of


@cache
def core_fields() -> dict[str, bool]:
    """The fields that may be given, each with whether it is true or false."""
    read = arguments_of("megatron.core.transformer.TransformerConfig")
    if read is not None:
        return {name: isinstance(kind, ast.Name) and kind.id == "bool" for name, kind in read.items()}
    from dataclasses import fields

    from megatron.core.transformer import TransformerConfig

    return {each.name: each.type in (bool, "bool") for each in fields(TransformerConfig) if each.init}
