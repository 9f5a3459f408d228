"""Serialises Lightning's state: plain data, which loads without running code, and apart from it pickled objects.

torch's ``weights_only`` unpickler decides what is plain: tensors, numbers, strings and containers of them, and the
classes that are declared in ``plain_classes.py``. Objects of other classes (of a user's callback, for
example) go into ``objects.pt``, which is a pickle and loads only if the user trusts the checkpoint.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.checkpoint.plain_classes import declared_plain

STATE = "trainer.pt"
OBJECTS = "objects.pt"
# A run resumes without these: only `load_from_checkpoint` reads them.
_NOT_NEEDED = ("hyper_parameters", "datamodule_hyper_parameters")


def split(state: dict[str, Any]) -> tuple[bytes, bytes | None, list[str]]:
    """Serialise a state.

    Returns:
        The plain data, the pickled objects (None if there are none), and the names of the objects.
    """
    whole = _plain(state)
    if whole is not None:
        return whole, None, []
    plain: dict[str, Any] = {}
    objects: list[tuple[list[str], Any]] = []
    for key, value in state.items():
        if isinstance(value, dict):
            plain[key] = {}
            for name, entry in value.items():
                _sort(plain[key], objects, [key, name], entry)
        else:
            _sort(plain, objects, [key], value)
    names = [".".join(map(str, path)) for path, _ in objects]
    return _dumps(plain), _dumps(objects) if objects else None, names


def join(plain: bytes, objects: bytes | None, names: list[str], trust: bool) -> dict[str, Any]:
    """Deserialise a state; pickled objects only if ``trust`` is set.

    Raises:
        CheckpointError: The run needs pickled objects, and ``trust`` is not set.
    """
    state: dict[str, Any] = loads_plain(plain)
    needed = [name for name in names if not name.startswith(_NOT_NEEDED)]
    if objects is None or (not trust and not needed):
        return state
    if not trust:
        raise CheckpointError(
            f"The checkpoint holds objects ({', '.join(needed)}) whose loading can run any code. If you trust where it"
            " comes from: MegatronStrategy(checkpointing=Checkpointing(allow_pickle=True))."
        )
    for path, value in torch.load(io.BytesIO(objects), map_location="cpu", weights_only=False):
        target = state
        for name in path[:-1]:
            target = target[name]
        target[path[-1]] = value
    return state


def dumps(value: dict[str, Any], of_user: Any) -> bytes:
    """Serialise plain data.

    Args:
        value: The data.
        of_user: The part of it that user code returned, which is checked.

    Raises:
        CheckpointError: The user's part is not plain data.
    """
    try:
        if of_user is not None:
            loads_plain(_dumps(of_user))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"The state_dict of a loader is not plain data (numbers, strings, tensors, containers of them): {error}"
        ) from error
    return _dumps(value)


def loads_plain(content: bytes) -> Any:
    """Deserialise plain data; anything else raises an error."""
    with torch.serialization.safe_globals(list(declared_plain)):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _plain(value: Any) -> bytes | None:
    """The serialised value, or None if a part of it is not plain data."""
    try:
        content = _dumps(value)
        loads_plain(content)
    except Exception:  # some part of the state causes it; `split` looks for that part
        return None
    return content


def _sort(plain: dict[str, Any], objects: list[Any], path: list[str], value: Any) -> None:
    try:
        content = _dumps(value)
    except Exception as error:
        name = ".".join(map(str, path))
        if path[0] not in _NOT_NEEDED:
            raise CheckpointError(f"{name} of the checkpoint cannot be saved: {error}") from error
        rank_zero_warn(f"{name} cannot be saved ({error}) and is left out of the checkpoint.")
        return
    try:
        loads_plain(content)
        plain[path[-1]] = value
    except pickle.UnpicklingError:
        objects.append((path, value))


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
