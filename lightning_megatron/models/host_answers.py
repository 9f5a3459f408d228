"""Answers questions about a batch on the host, before the batch moves, so that no step waits for the device.

What a model computes may depend on the values in a batch: whether a row is padded decides whether attention needs a
mask. On the device, such a question would stop the host until everything before it has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import ref

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

# Of one value for each row, as a tensor [b]; known by its name.
Question = Callable[[Any], torch.Tensor]
Answers = dict[str, list[Any]]  # by the questions' names, an answer for each row

_KEY = "host_answers"


def has_transfer_hooks(module: pl.LightningModule) -> bool:
    """Whether the module or its data module may change batches on their way to the device."""
    owners = [module, module.trainer.datamodule]  # type: ignore[attr-defined]
    hooks = ("transfer_batch_to_device", "on_after_batch_transfer")
    return any(owner is not None and is_overridden(hook, owner) for owner in owners for hook in hooks)


def ask(batch: Mapping[str, Any], questions: Iterable[Question]) -> Answers:
    """The answer to each question for each row of a batch, whose tensors are on the host."""
    return {question.__name__: question(batch).tolist() for question in questions}


class _LastBatch:
    """The answers about the batch that has moved last; they are found again by the memory of its tensors.

    So a batch has nothing in it that its loader has not given, for a step or a hook that passes all of it on.
    """

    def __init__(self, batch: Mapping[str, Any], answers: Answers) -> None:
        self._tensors = {name: (ref(x), _version(x)) for name, x in batch.items() if isinstance(x, torch.Tensor)}
        self._answers = answers

    def about(self, batch: Mapping[str, Any]) -> Answers:
        """The answers about a batch or micro-batch; none if a tensor in it is no unchanged row or rows of the last."""
        tensors = {name: x for name, x in batch.items() if isinstance(x, torch.Tensor)}
        if tensors and all(self._is_whole(name, x) for name, x in tensors.items()):
            return self._answers
        rows = {self._rows(name, x) for name, x in tensors.items() if x.dim()}
        if len(rows) != 1 or not all(self._is_whole(name, x) for name, x in tensors.items() if not x.dim()):
            return {}
        found = rows.pop()
        return {} if found is None else {question: each[slice(*found)] for question, each in self._answers.items()}

    def _is_whole(self, name: str, tensor: torch.Tensor) -> bool:
        known, version = self._tensors.get(name, (None, 0))
        return known is not None and known() is tensor and _version(tensor) == version

    def _rows(self, name: str, tensor: torch.Tensor) -> tuple[int, int] | None:
        """The rows of the last batch's tensor that this one is, from the first to behind the last."""
        known, version = self._tensors.get(name, (None, 0))
        whole = None if known is None else known()
        if whole is None or _version(tensor) != version or _address(tensor) != _address(whole):
            return None
        if tensor.shape[1:] != whole.shape[1:] or tensor.stride() != whole.stride():
            return None
        if len(tensor) == len(whole):
            return (0, len(whole)) if tensor.storage_offset() == whole.storage_offset() else None
        if not whole.stride(0):  # one row in place of all
            return None
        first = (tensor.storage_offset() - whole.storage_offset()) // whole.stride(0)
        return first, first + len(tensor)


_last = _LastBatch({}, {})


def remember(batch: Any, answers: Answers) -> None:
    """Keep the answers about a batch that is on the device now, until the next one."""
    global _last
    _last = _LastBatch(batch if answers else {}, answers)


def with_answers(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch or micro-batch with what the host has answered about its rows, if it is still as it was then."""
    return {**batch, _KEY: _last.about(batch)}


def answers(batch: Mapping[str, Any], question: Question) -> list[Any]:
    """The answer for each row of a batch or micro-batch, which is asked now where the host has not."""
    carried = batch.get(_KEY, {}).get(question.__name__)
    return question(batch).tolist() if carried is None else carried


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(tensor: torch.Tensor) -> int:
    """A number that every change in place raises, of views too; private in torch (2.13)."""
    return 0 if tensor.is_inference() else tensor._version
