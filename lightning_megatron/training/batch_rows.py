"""Counts, takes and joins the rows of a batch, or of what a step returns, in containers of any kind.

One rule holds for all containers: the first dimension of tensors and numpy arrays is the rows, and so is the length of
lists and tuples. Mappings, dataclasses and named tuples are looked into, field by field, and so is a list whose
elements have the rows. Numbers, texts, None and tensors without dimensions have no rows, and go whole to every
micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sized
from copy import copy
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

_PLAIN = (Number, str, bytes, type(None), np.generic)


def count_rows(batch: Any) -> int:
    """Count the rows of a batch: those of the first tensor or array outside of lists, or else of its lists.

    Raises:
        ValueError: The batch has no rows.
    """
    sizes = list(_sizes(batch))
    nearest = [size for depth, size in sizes if depth <= _is_sequence(batch)]
    if _is_sequence(batch) and _holds_samples(batch):
        rows = len(batch)
    elif nearest:
        rows = nearest[0]
    else:
        rows = _rows_of_lists(batch)[0]
    if not rows:
        raise ValueError(
            f"The batch ({type(batch).__name__}) is empty, or nothing in it has rows, so it cannot be cut into"
            " micro-batches."
        )
    return rows


def take_rows(batch: Any, start: int, stop: int, rows: int) -> Any:
    """Take rows ``start`` to ``stop`` of a batch of ``rows``, in containers of the same kind.

    Raises:
        ValueError: An entry has another number of rows, or its rows are ambiguous; the text names it.
    """
    if stop - start == rows:
        return batch
    _check_clear(batch)
    if _is_sequence(batch) and not _holds_samples(batch):  # the fields of a batch, as torch's own collation makes them
        return _like(batch, [_take(x, start, stop, rows, f"batch[{i}]") for i, x in enumerate(batch)])
    return batch[start:stop] if _is_sequence(batch) else _take(batch, start, stop, rows, "batch")


def join_rows(parts: list[Any], sizes: list[int]) -> Any:
    """Join what steps returned for the parts of a batch, as if one step had run on the whole batch.

    Values with rows are concatenated. A value without rows is kept if all parts have the same; otherwise the result is
    a list of the parts' values.

    Args:
        parts: The values that the step returned, one for each part.
        sizes: The number of rows of each part.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        return list(parts)
    fields = [_fields(part) for part in parts]
    if fields[0] is not None:
        if any(list(found or ()) != list(fields[0]) for found in fields):
            return list(parts)
        return _with_fields(first, {name: join_rows([f[name] for f in fields if f], sizes) for name in fields[0]})
    if _is_sequence(first):
        return _join_sequences(parts, sizes)
    if isinstance(first, _PLAIN) or (isinstance(first, torch.Tensor | np.ndarray) and not first.ndim):
        return first if all(bool(part == first) for part in parts) else list(parts)
    return _concatenated(parts, sizes)


def form_of_rows(value: Any, rows: int) -> Any:
    """The form of a value whose rows can be separated and joined again; None for other values.

    Values of one form can be joined. Values without rows are part of the form, as they are kept only if all are equal.
    """
    fields = _fields(value)
    if fields is None and _is_sequence(value) and (len(value) != rows or _is_ambiguous(value, rows)):
        fields = dict(enumerate(value))
    if fields is not None:
        forms = {name: form_of_rows(x, rows) for name, x in fields.items()}
        return (type(value), tuple(forms.items())) if forms and None not in forms.values() else None
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, torch.Tensor) and value.is_nested:
        return "nested" if value.size(0) == rows else None
    if _length(value) != rows:
        return None
    return type(value), *(value.shape[1:] if isinstance(value, torch.Tensor | np.ndarray) else ())


def one_row(value: Any, row: int, rows: int) -> Any:
    """Take row ``row`` of a value that has a ``form_of_rows``, as a value of one row."""
    fields = _fields(value)
    if fields is not None:
        return _with_fields(value, {name: one_row(x, row, rows) for name, x in fields.items()})
    if _is_sequence(value) and (len(value) != rows or _is_ambiguous(value, rows)):
        return _like(value, [one_row(x, row, rows) for x in value])
    return value if isinstance(value, _PLAIN) else _part(value, row, row + 1)


def _take(value: Any, start: int, stop: int, rows: int, where: str) -> Any:
    fields = _fields(value)
    if fields is not None:
        return _with_fields(value, {n: _take(x, start, stop, rows, f"{where}[{n!r}]") for n, x in fields.items()})
    if _is_sequence(value) and len(value) != rows and (not value or any(_holds_rows(x) for x in value)):
        return _like(value, [_take(x, start, stop, rows, f"{where}[{i}]") for i, x in enumerate(value)])
    length = _length(value)
    if length is None and not _is_opaque(value):
        return value
    if length != rows:
        raise ValueError(
            f"{where} is {_described(value)}, and the batch has {rows} rows. To cut a batch into micro-batches,"
            " the first dimension of every tensor, array, list and tuple in it must be the batch. Numbers, texts and"
            " tensors without dimensions go whole to each micro-batch; keep other settings in the module."
        )
    if _is_sequence(value) and _is_ambiguous(value, rows):
        raise ValueError(
            f"{where} is {_described(value)} whose elements all have {rows} rows, as the batch has. It may be a"
            f" list of {rows} fields, or of one element for each row. Give fields names (a dict), or stack the elements"
            " of rows into one tensor."
        )
    return _part(value, start, stop)


def _join_sequences(parts: list[Any], sizes: list[int]) -> Any:
    """Join lists or tuples: lists of rows are concatenated, lists of fields are joined field by field."""
    pairs = list(zip(parts, sizes, strict=True))
    may_be_fields = all(_is_ambiguous(part, size) for part, size in pairs)
    if may_be_fields or not all(len(part) == size for part, size in pairs):
        arrays = [x for x in parts[0] if isinstance(x, torch.Tensor | np.ndarray)]
        may_be_fields |= isinstance(parts[0], tuple) or any(_length(x) == sizes[0] for x in arrays)
        if may_be_fields and len({len(part) for part in parts}) == 1:
            return _like(parts[0], [join_rows(list(each), sizes) for each in zip(*parts, strict=True)])
    return type(parts[0])(x for part in parts for x in part)


def _concatenated(parts: list[Any], sizes: list[int]) -> Any:
    first = parts[0]
    if isinstance(first, PackedSequence):
        return pack_sequence([row for part in parts for row in unpack_sequence(part)], enforce_sorted=False)
    if not isinstance(first, torch.Tensor | np.ndarray):
        return first if all(part is first for part in parts) else list(parts)
    if isinstance(first, torch.Tensor) and first.is_nested:
        return torch.nested.as_nested_tensor([row for part in parts for row in part.unbind()], layout=first.layout)
    whole_rows = all(len(part) % size == 0 for part, size in zip(parts, sizes, strict=True))
    if not whole_rows or len({tuple(part.shape[1:]) for part in parts}) > 1:
        return list(parts)
    return torch.cat(parts) if isinstance(first, torch.Tensor) else np.concatenate(parts)


def _sizes(value: Any, depth: int = 0) -> Iterator[tuple[int, int]]:
    """Yield for every tensor and array how many lists are around it, and its rows."""
    fields = _fields(value)
    if fields is not None:
        for x in fields.values():
            yield from _sizes(x, depth)
    elif _is_sequence(value):
        for x in value:
            yield from _sizes(x, depth + 1)
    elif (length := _length(value)) is not None:
        yield depth, length


def _rows_of_lists(batch: Any) -> tuple[int, int]:
    """What the rows of a batch without tensors outside of lists may be: those in the lists, and the lists' length.

    Each is 0 if the lists differ in it. If the lists hold no tensors, both are the length.
    """
    fields = _fields(batch) or {}
    lists = [x for x in fields.values() if _is_sequence(x)]
    lengths = {len(x) for x in lists} or {len(batch) if _is_sequence(batch) else 0}
    length = lengths.pop() if len(lengths) == 1 else 0
    inside = {size for _, size in _sizes(lists)}
    return inside.pop() if len(inside) == 1 else length, length


def _check_clear(batch: Any) -> None:
    """Refuse a batch that consists of lists if these may be lists of fields or of rows."""
    if _is_sequence(batch) or any(depth == 0 for depth, _ in _sizes(batch)):
        return
    inside, length = _rows_of_lists(batch)
    if inside != length:
        raise ValueError(
            f"The rows of this batch are ambiguous: its lists have {length or 'different numbers of'} elements, and the"
            f" tensors in them {inside} rows. Add a tensor or array with one row for each sample, outside of a list."
        )


def _holds_samples(batch: Any) -> bool:
    """Whether a batch that is a list has a sample in each element, as a ``collate_fn`` returns that does not collate.

    This is assumed if it cannot be a list of fields, since its tensors have different numbers of rows.
    """
    near = {size for depth, size in _sizes(batch) if depth == 1}
    if not near:
        return bool(batch)
    return len(near) > 1 and all(_fields(x) is not None for x in batch)


def _holds_rows(value: Any) -> bool:
    """Whether ``value``, or something in it, has a first dimension or a length."""
    fields = _fields(value)
    return _length(value) is not None if fields is None else any(_holds_rows(x) for x in fields.values())


def _is_ambiguous(value: Any, rows: int) -> bool:
    """Whether a list of ``rows`` elements may as well be a list of fields that have ``rows`` rows each."""
    return bool(value) and all(not isinstance(x, list) and _length(x) == rows for x in value)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple) and not hasattr(value, "_fields")


def _length(value: Any) -> int | None:
    """The number of rows of ``value`` itself; None if it is nothing that has rows."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, torch.Tensor | np.ndarray):
        return (value.size(0) if isinstance(value, torch.Tensor) else len(value)) if value.ndim else None
    return len(value) if _is_sequence(value) else None


def _is_opaque(value: Any) -> bool:
    """Whether ``value`` may hold rows that cannot be found: a set, an iterator, an object with tensors in it."""
    if isinstance(value, (*_PLAIN, torch.Tensor, np.ndarray, type)):
        return False
    return isinstance(value, Sized | Iterable) or any(_holds_rows(x) for x in getattr(value, "__dict__", {}).values())


def _part(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, PackedSequence):
        return pack_sequence(unpack_sequence(value)[start:stop], enforce_sorted=value.sorted_indices is None)
    if isinstance(value, torch.Tensor) and value.is_nested:
        return torch.nested.as_nested_tensor(list(value.unbind())[start:stop], layout=value.layout)
    if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
        chosen = torch.arange(start, stop, device=value.device)
        return value.to_sparse_coo().index_select(0, chosen).to_sparse(layout=value.layout)
    return value[start:stop]


def _fields(value: Any) -> dict[Any, Any] | None:
    """The entries of a mapping, dataclass or named tuple, by name; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, PackedSequence):
        return value._asdict()  # type: ignore[attr-defined]
    return None


def _with_fields(value: Any, fields: dict[Any, Any]) -> Any:
    """Copy ``value`` with other entries."""
    if isinstance(value, Mapping):
        if not isinstance(value, MutableMapping):
            return type(value)(fields)  # type: ignore[call-arg]
        made = copy(value)
        for name, x in fields.items():
            made[name] = x
        return made
    if isinstance(value, tuple):
        return type(value)(*fields.values())
    made = copy(value)
    for name, x in fields.items():
        object.__setattr__(made, name, x)  # a frozen one too
    return made


def _like(value: Any, elements: list[Any]) -> Any:
    return type(value)(elements)


def _described(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, torch.Tensor | np.ndarray) and not (isinstance(value, torch.Tensor) and value.is_nested):
        return f"a {kind} of shape {tuple(value.shape)}"
    length = _length(value)
    if length is None:
        return f"a {kind}, whose rows cannot be determined"
    return f"a {kind} of {length} elements" if _is_sequence(value) else f"a {kind} of {length} rows"
