"""Undoes what hooks change in the attributes of a module or callback: lists, counters, running sums.

A padding micro-batch, and a batch of an evaluation that another replica counts, go through the user's hooks like all
others. What the hooks note down meanwhile is undone, so that nothing is counted twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Number
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

_PLAIN = (Number, str, tuple, frozenset, type(None))
_CONTAINERS = (list, dict, set, deque)
_LARGE = 1 << 20  # elements; larger arrays are data or weights, and are not copied
_LIGHTNINGS = frozenset(vars(pl.LightningModule()))


@contextmanager
def taken_back(owners: Iterable[Any]) -> Iterator[None]:
    """Undo, at the end, changes of the attributes of ``owners``: numbers, texts, small arrays and containers of them.

    Containers and tensors keep their identity. Changes of submodules and of other objects stay.

    Args:
        owners: The modules or callbacks whose attributes are restored.
    """
    undo: list[Callable[[], Any]] = []
    seen: set[int] = set()
    for owner in owners:
        for held in (vars(owner), getattr(owner, "_buffers", {})):
            undo.append(_attributes(held, seen))
            for name, value in held.items():
                if name not in _LIGHTNINGS:
                    undo += _contents(value, seen)
    try:
        yield
    finally:
        with torch.no_grad():
            for step in undo:
                step()


def _attributes(held: dict[str, Any], seen: set[int]) -> Callable[[], None]:
    """Return what restores attributes to their present values, and removes those that are new."""
    before = {name: value for name, value in held.items() if name not in _LIGHTNINGS and _is_kept(value)}
    names = set(held)

    def undo() -> None:
        for name in [name for name, value in held.items() if name not in names and _is_kept(value)]:
            del held[name]
        held.update(before)

    return undo


def _is_kept(value: Any) -> bool:
    arrays = (torch.Tensor, np.ndarray)
    return isinstance(value, (*_PLAIN, *_CONTAINERS, *arrays)) and not isinstance(value, torch.nn.Parameter)


def _contents(value: Any, seen: set[int]) -> Iterator[Callable[[], Any]]:
    """Yield the functions that restore a container or array, and those in it, to the present contents."""
    if id(value) in seen or not _is_kept(value):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        is_fixed = value.requires_grad or value.is_inference()
        if value.numel() <= _LARGE and value.layout is torch.strided and not is_fixed:
            before, version = value.clone(), value._version
            # A backward pass may need a tensor that was only read, and fails if it has been written to.
            yield lambda: value.copy_(before) if value._version != version else None
    elif isinstance(value, np.ndarray):
        if value.size <= _LARGE and value.flags.writeable:
            copied = value.copy()
            yield lambda: np.copyto(value, copied)
    elif isinstance(value, dict):
        items = dict(value)
        yield partial(_refill, value, value.update, items)
        for each in items.values():
            yield from _contents(each, seen)
    elif isinstance(value, list | deque | set):
        elements = list(value)
        yield partial(_refill, value, value.update if isinstance(value, set) else value.extend, elements)
        for each in elements:
            yield from _contents(each, seen)
    elif isinstance(value, tuple):
        for each in value:
            yield from _contents(each, seen)


def _refill(container: Any, add: Callable[[Any], Any], contents: Any) -> None:
    container.clear()
    add(contents)
