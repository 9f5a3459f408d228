"""The state of an optimizer as shards of whole tensors: moments, step counts and fp32 main weights.

A state tensor of the weight ``k`` is the whole tensor ``optimizer.<state>.k``, the main weight is
``optimizer.main_weight.k``. So the state of any layout, sharded or replicated, of any precision, loads into any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from lightning_megatron.checkpoint.places import Place
from lightning_megatron.optimizer import Held, ShardedOptimizer

MAIN_WEIGHT = "main_weight"


def shards(optimizer: ShardedOptimizer, where: dict[int, Place]) -> list[ShardedTensor]:
    """This rank's part of the state.

    Args:
        optimizer: Whose.
        where: Places of the model's parameters, by their ``id``.

    Raises:
        TypeError: A state that is neither one number nor as large as its weight, so that no other layout could read it.
    """
    found: list[ShardedTensor] = []
    for held in optimizer.held():
        place = where[id(held.parameter)]
        for name, value in optimizer.state.get(held.main, {}).items():
            if value is not None:
                found += _state_shards(name, torch.as_tensor(value), held, place)
        if held.main.dtype != held.parameter.dtype:
            found += _like_main(held.main.detach(), held, place, _key(MAIN_WEIGHT, place))
    return found


class Loading:
    """Buffers for the state of this rank, filled by a read of ``shards`` and then handed over by ``finish``.

    Args:
        optimizer: That takes the state.
        where: Places of the model's parameters, by their ``id``.
        stored: Keys of the checkpoint's tensors, with their types.
    """

    def __init__(self, optimizer: ShardedOptimizer, where: dict[int, Place], stored: dict[str, torch.dtype]) -> None:
        self._optimizer = optimizer
        self.shards: list[ShardedTensor] = []
        self._finish: list[Callable[[], None]] = []
        names = sorted({key.split(".")[1] for key in stored if key.startswith("optimizer.")} - {MAIN_WEIGHT})
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for held in optimizer.held():
            place = where[id(held.parameter)]
            state: dict[str, Any] = {}
            for name in names:
                scalar, tensor = _key(name, place, scalar=True), _key(name, place)
                if scalar in stored:
                    self._expect_scalar(state, name, scalar, stored[scalar], held, groups[id(held.main)])
                elif tensor in stored:
                    state[name] = torch.zeros_like(held.main)
                    self.shards += _like_main(state[name], held, place, tensor)
            if state:
                self._finish.append(lambda main=held.main, state=state: self._adopt(main, state))  # type: ignore[misc]
            self._expect_main_weight(held, place, stored)

    def finish(self) -> None:
        """Give the optimizer what was read."""
        for step in self._finish:
            step()

    def _expect_scalar(
        self, state: dict[str, Any], name: str, key: str, dtype: torch.dtype, held: Held, group: dict[str, Any]
    ) -> None:
        # As torch's Optimizer.load_state_dict places it: `step` stays on the host unless the kernel wants it.
        on_device = name != "step" or group.get("capturable") or group.get("fused")
        number = torch.zeros(1, dtype=dtype)
        self.shards.append(ShardedTensor(key, number, dtype, (1,), (1,), (0,), None, 0))
        state[name] = None  # keeps the order of names
        device = held.main.device if on_device else torch.device("cpu")
        self._finish.append(lambda: state.__setitem__(name, number.reshape(()).to(device)))

    def _expect_main_weight(self, held: Held, place: Place, stored: dict[str, torch.dtype]) -> None:
        """Main weights come from main weights, or from the weights of a run that had none."""
        if held.main.dtype == held.parameter.dtype:
            return
        key = _key(MAIN_WEIGHT, place)
        buffer = torch.zeros_like(held.main.detach())
        source = key if key in stored else f"model.{place.key}"
        if source in stored:
            self.shards += _like_main(buffer, held, place, source)
            self._finish.append(lambda main=held.main: main.data.copy_(buffer))  # type: ignore[misc]

    def _adopt(self, main: torch.Tensor, state: dict[str, Any]) -> None:
        self._optimizer.state[main] = state


def _state_shards(name: str, value: torch.Tensor, held: Held, place: Place) -> Iterator[ShardedTensor]:
    if value.shape == held.main.shape:
        yield from _like_main(value, held, place, _key(name, place))
    elif value.numel() == 1:
        whole = place if held.start is None else place.in_parts()
        yield whole.scalar_shard(value, _key(name, place, scalar=True), is_first=not held.start)
    else:
        raise TypeError(
            f"The optimizer's state {name!r} of {place.key} has the shape {tuple(value.shape)}, and the weight"
            f" {place.local_shape}: such state cannot be cut for another layout, and is not written. Use an optimizer"
            " whose state is as large as the weights (AdamW, Adam, SGD), or save weights only (save_weights_only=True)."
        )


def _like_main(tensor: torch.Tensor, held: Held, place: Place, key: str) -> list[ShardedTensor]:
    if held.start is None:
        return place.shards(tensor, key)
    return place.in_parts().flat_shards(tensor, held.start, key)


def _key(state: str, place: Place, scalar: bool = False) -> str:
    return f"optimizer.{state}.{place.key}{':number' if scalar else ''}"
