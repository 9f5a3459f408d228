"""Writes a safetensors file tensor by tensor; the library's own writer needs all tensors in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

# Names of dtypes in a safetensors file: https://github.com/huggingface/safetensors#format
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
Kinds = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The size of a tensor in bytes."""
    return math.prod(shape) * dtype.itemsize


class SafetensorsFile:
    """A safetensors file whose tensors are written one after the other, in any order.

    Args:
        path: The path of the file.
        kinds: Shape and dtype of each tensor, by its name.
    """

    def __init__(self, path: Path, kinds: Kinds) -> None:
        self._kinds = kinds
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in kinds.items():
            start, end = end, end + size(shape, dtype)
            self._starts[name] = start
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, which has the shape and dtype that ``kinds`` says."""
        shape, dtype = self._kinds[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {list(tensor.shape)} of {tensor.dtype}, but was announced as {list(shape)} of {dtype}."
            )
        if tensor.numel():
            self._file.seek(self._data + self._starts[name])
            self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Close the file, which is whole now."""
        self._file.close()


def write(path: Path, kinds: Kinds, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a whole file of tensors."""
    file = SafetensorsFile(path, kinds)
    try:
        for name, tensor in tensors:
            file.write(name, tensor)
    finally:
        file.close()
