"""What a chunk's parameters are called in the whole model, whatever the pipeline stages and virtual stages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

_LAYER = re.compile(r"(?P<stack>.*\blayers)\.(?P<number>\d+)\.(?P<rest>.*)")
_TIED = {"output_layer.weight": "embedding.word_embeddings.weight"}


def whole_name(chunk: torch.nn.Module, name: str) -> str:
    """The name, in the unsharded model, of a parameter that ``chunk`` calls ``name``.

    megatron-core numbers the layers of each chunk from 0 and notes the place in the model, from 1, as
    ``layer_number``. A tied output layer on the last stage is a copy of the embedding and has its name.

    Args:
        chunk: One of megatron-core's models, as ``MegatronModule.build_model`` made it.
        name: From ``chunk.named_parameters()``.
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
    """The chunk's parameters, this rank's shards of them, under the unsharded model's names."""
    for name, parameter in torch.nn.Module.named_parameters(chunk):  # a ``WholeModelNames`` has them whole already
        yield whole_name(chunk, name), parameter


class WholeModelNames:
    """Put before a class of chunks, it has ``named_parameters`` give the unsharded model's names.

    The keys of ``state_dict`` and the names of ``named_modules`` stay those of the chunk's own tree.
    """

    def named_parameters(
        self: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """As of ``torch.nn.Module``, but for the names."""
        start = f"{prefix}." if prefix else ""
        for name, parameter in torch.nn.Module.named_parameters(self, "", recurse, remove_duplicate):
            yield start + whole_name(self, name), parameter
