"""Answers questions about a batch on the host, before the batch moves, so that no step waits for the device.

What a model computes may depend on the values in a batch: whether a row is padded decides whether attention needs a
mask. On the device, such a question would stop the host until everything before it has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from copy import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

# Of one value for each row, as a tensor [b]; known by its name.
Question = Callable[[Any], torch.Tensor]

_KEY = "host_answers"  # lists with an element for each row: they are cut into micro-batches with the rest
_OF = "of"  # what the answers are about


class _Tensors:
    """The tensors of a batch on the device, and how often each has been changed; whole for each micro-batch."""

    __slots__ = ("seen",)

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self.seen = {name: (x, _version(x)) for name, x in batch.items() if isinstance(x, torch.Tensor)}

    def are_in(self, batch: Mapping[str, Any]) -> bool:
        """Whether all tensors of ``batch`` are these, or rows of these, unchanged."""
        tensors = {name: x for name, x in batch.items() if isinstance(x, torch.Tensor)}
        return tensors.keys() <= self.seen.keys() and all(
            _address(x) == _address(self.seen[name][0]) and _version(x) == self.seen[name][1]
            for name, x in tensors.items()
        )


def has_transfer_hooks(module: pl.LightningModule) -> bool:
    """Whether the module or its data module may change batches on their way to the device."""
    owners = [module, module.trainer.datamodule]  # type: ignore[attr-defined]
    hooks = ("transfer_batch_to_device", "on_after_batch_transfer")
    return any(owner is not None and is_overridden(hook, owner) for owner in owners for hook in hooks)


def with_answers(batch: Mapping[str, Any], questions: Iterable[Question]) -> Mapping[str, Any]:
    """A copy of a batch of the loader's that also carries the answers to ``questions``, each asked of the batch."""
    given = {name: value for name, value in batch.items() if value is not None}
    found = {question.__name__: question(given).tolist() for question in questions}
    answered = copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
    answered[_KEY] = found
    return answered


def sealed(batch: Any) -> Any:
    """The batch, on the device now, with a note of its tensors: the answers it carries are about these only."""
    if isinstance(batch, MutableMapping) and _KEY in batch:
        batch[_KEY] = {**batch[_KEY], _OF: _Tensors(batch)}
    return batch


def trusted(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch or micro-batch without the answers it carries if a hook has changed a tensor, or put another in."""
    of = batch.get(_KEY, {}).get(_OF)
    if of is not None and of.are_in(batch):
        return batch
    return without_answers(batch)


def without_answers(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without the answers it may carry."""
    return {name: value for name, value in batch.items() if name != _KEY}


def answers(batch: Mapping[str, Any], question: Question) -> list[Any]:
    """The answer for each row of a batch or micro-batch, which is asked now where it does not carry it."""
    carried = batch.get(_KEY, {}).get(question.__name__)
    return question(batch).tolist() if carried is None else carried


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(tensor: torch.Tensor) -> int:
    """A number that every change in place raises, of views too; private in torch (2.13)."""
    return 0 if tensor.is_inference() else tensor._version
