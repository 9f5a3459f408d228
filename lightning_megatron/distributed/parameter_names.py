"""Translates the parameter names of a model chunk to those of the whole model, under any pipeline layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

_LAYER = re.compile(r"(?P<stack>.*\blayers)\.(?P<number>\d+)\.(?P<rest>.*)")
_TIED = {"output_layer.weight": "embedding.word_embeddings.weight"}


def whole_name(chunk: torch.nn.Module, name: str) -> str:
    """Return the name, in the unsharded model, of a parameter that ``chunk`` calls ``name``.

    megatron-core numbers the layers of each chunk from 0, and stores a layer's number in the whole model, from 1, as
    ``layer_number``. A tied output layer on the last stage is a copy of the embedding, and gets the embedding's name.

    Args:
        chunk: A model chunk, as ``MegatronModule.build_model`` returns it.
        name: A name from ``chunk.named_parameters()``.
    """
    found = _LAYER.fullmatch(name)
    if found:
        layer = chunk.get_submodule(f"{found['stack']}.{found['number']}")
        number = getattr(layer, "layer_number", int(found["number"]) + 1) - 1
        return f"{found['stack']}.{number}.{found['rest']}"
    if getattr(chunk, "share_embeddings_and_output_weights", False):
        return _TIED.get(name, name)
    return name


def named_shards(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this rank's shards of the chunk's parameters, under the unsharded model's names."""
    for name, parameter in torch.nn.Module.named_parameters(chunk):  # not the override of ``WholeModelNames``
        yield whole_name(chunk, name), parameter


class WholeModelNames:
    """A mixin for model chunks: ``named_parameters`` gives the unsharded model's names.

    The keys of ``state_dict`` and the names of ``named_modules`` remain those of the chunk.
    """

    def named_parameters(
        self: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Do what ``torch.nn.Module`` does, with the unsharded model's names."""
        start = f"{prefix}." if prefix else ""
        for name, parameter in torch.nn.Module.named_parameters(self, "", recurse, remove_duplicate):
            yield start + whole_name(self, name), parameter
