"""Saves and loads optimizer state (moments, step counts, fp32 main weights) as shards of whole tensors.

A state tensor of the weight ``k`` is stored as the whole tensor ``optimizer.<state>.k``, the main weight is
``optimizer.main_weight.k``. So the state of any layout, sharded or replicated, in any precision, loads into any other.
State of another shape than its weight's (Adafactor's rows and columns) needs weights that are not divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.checkpoint.tensor_shards import ShardSpec
from lightning_megatron.training.optimizer import ParameterSlice, ShardedOptimizer
from lightning_megatron.training.optimizers.lean_adamw import zero_moment
from lightning_megatron.training.whole_optimizer import WholeOptimizer

MAIN_WEIGHT = "main_weight"
# Suffixes of the keys of state that has not its weight's shape: a number, or state of an undivided weight.
_NUMBER, _WHOLE = ":number", ":whole"


def shards(optimizer: ShardedOptimizer, where: dict[int, ShardSpec]) -> list[ShardedTensor]:
    """Make the shards of this rank's optimizer state.

    Args:
        optimizer: The optimizer.
        where: The specs of the model's parameters, by the parameters' ``id``.

    Raises:
        CheckpointError: A state of a divided weight is neither one number nor as large as the weight.
    """
    found: list[ShardedTensor] = []
    for part in optimizer.parameter_slices():
        spec = where[id(part.parameter)]
        for name, value in optimizer.state.get(part.main_param, {}).items():
            if value is not None:
                tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, device="cpu")
                found += _state_shards(name, tensor, part, spec)
        if part.main_param.dtype != part.parameter.dtype:
            found += _like_main(part.main_param.detach(), part, spec, _key(MAIN_WEIGHT, spec))
    return found


class Loading:
    """Buffers for this rank's state: reading ``shards`` fills them, and ``finish`` gives them to the optimizer.

    Args:
        optimizer: The optimizer that takes the state.
        where: The specs of the model's parameters, by the parameters' ``id``.
        stored: The checkpoint's tensors, by their keys.

    Raises:
        CheckpointError: A state needs an undivided weight, and this layout divides it.
    """

    def __init__(
        self,
        optimizer: ShardedOptimizer | WholeOptimizer,
        where: dict[int, ShardSpec],
        stored: dict[str, TensorStorageMetadata],
    ) -> None:
        self._optimizer = optimizer
        self.shards: list[ShardedTensor] = []
        self._finish: list[Callable[[], None]] = []
        names = sorted({key.split(".")[1] for key in stored if key.startswith("optimizer.")} - {MAIN_WEIGHT})
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for part in optimizer.parameter_slices():
            spec = where[id(part.parameter)]
            state: dict[str, Any] = {}
            for name in names:
                scalar, whole, tensor = _key(name, spec, _NUMBER), _key(name, spec, _WHOLE), _key(name, spec)
                if scalar in stored:
                    dtype = stored[scalar].properties.dtype
                    self._expect_scalar(state, name, scalar, dtype, part, groups[id(part.main_param)])
                elif whole in stored:
                    _check_whole(name, part, spec)
                    shape = stored[whole].size
                    state[name] = torch.zeros(
                        shape, dtype=stored[whole].properties.dtype, device=part.main_param.device
                    )
                    self.shards.append(spec.unsplit_shard(state[name], whole))
                elif tensor in stored:
                    state[name] = zero_moment(name, part.main_param, groups[id(part.main_param)])
                    self.shards += _like_main(state[name], part, spec, tensor)
            if state:
                self._finish.append(lambda main=part.main_param, state=state: self._adopt(main, state))  # type: ignore[misc]
            self._expect_main_weight(part, spec, stored)

    def finish(self) -> None:
        """Give the optimizer the state that was read."""
        for step in self._finish:
            step()

    def _expect_scalar(
        self,
        state: dict[str, Any],
        name: str,
        key: str,
        dtype: torch.dtype,
        part: ParameterSlice,
        group: dict[str, Any],
    ) -> None:
        # As in torch's Optimizer.load_state_dict, `step` stays on the host unless the kernel needs it on the device.
        on_device = name != "step" or group.get("capturable") or group.get("fused")
        number = torch.zeros(1, dtype=dtype, device="cpu")
        self.shards.append(ShardedTensor(key, number, dtype, (1,), (1,), (0,), None, 0))
        state[name] = None  # keeps the order of names
        device = part.main_param.device if on_device else torch.device("cpu")
        self._finish.append(lambda: state.__setitem__(name, number.reshape(()).to(device)))

    def _expect_main_weight(
        self, part: ParameterSlice, spec: ShardSpec, stored: dict[str, TensorStorageMetadata]
    ) -> None:
        """Read main weights from main weights, or from the weights of a run without them."""
        if part.main_param.dtype == part.parameter.dtype:
            return
        key = _key(MAIN_WEIGHT, spec)
        buffer = torch.zeros_like(part.main_param.detach())
        source = key if key in stored else f"model.{spec.key}"
        if source in stored:
            self.shards += _like_main(buffer, part, spec, source)
            self._finish.append(lambda main=part.main_param: main.data.copy_(buffer))  # type: ignore[misc]

    def _adopt(self, main: torch.Tensor, state: dict[str, Any]) -> None:
        self._optimizer.state[main] = state


def _state_shards(name: str, value: torch.Tensor, part: ParameterSlice, spec: ShardSpec) -> Iterator[ShardedTensor]:
    if value.shape == part.main_param.shape:
        yield from _like_main(value, part, spec, _key(name, spec))
    elif value.numel() == 1 and value.dim() < 2:
        shared = spec if part.start is None else spec.split_over_replicas()
        yield shared.scalar_shard(value, _key(name, spec, _NUMBER), is_first=not part.start)
    else:
        _check_whole(name, part, spec)
        yield spec.unsplit_shard(value, _key(name, spec, _WHOLE))


def _check_whole(name: str, part: ParameterSlice, spec: ShardSpec) -> None:
    if part.start is not None or not spec.is_whole:
        raise CheckpointError(
            f"The optimizer's state {name!r} of {spec.key} has another shape than the weight, {spec.shape}, and"
            " this layout divides the weight between ranks, but such state cannot be divided. Use tp=1 and"
            " distributed_optimizer=False, an optimizer whose state is as large as the weights (AdamW, Adam, SGD), or"
            " weights only (save_weights_only=True)."
        )


def _like_main(tensor: torch.Tensor, part: ParameterSlice, spec: ShardSpec, key: str) -> list[ShardedTensor]:
    if part.start is None:
        return spec.shards(tensor, key)
    return spec.split_over_replicas().flat_shards(tensor, part.start, key)


def _key(state: str, spec: ShardSpec, kind: str = "") -> str:
    return f"optimizer.{state}.{spec.key}{kind}"
