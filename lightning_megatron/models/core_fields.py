"""The fields of megatron-core's ``TransformerConfig``, read from its source: to import it takes seconds."""

from __future__ import annotations

import ast
from functools import cache

from lightning_megatron.distributed.signatures import arguments_of


@cache
def core_fields() -> dict[str, str]:
    """The fields that may be given, with their types as they are written."""
    read = arguments_of("megatron.core.transformer.TransformerConfig")
    if read is not None:
        return {name: ast.unparse(annotation) if annotation else "" for name, annotation in read.items()}
    from dataclasses import fields

    from megatron.core.transformer import TransformerConfig

    return {each.name: str(each.type) for each in fields(TransformerConfig) if each.init}
