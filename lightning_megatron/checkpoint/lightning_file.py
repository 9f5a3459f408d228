"""Checkpoints in Lightning's own format: one file, which ``torch.load`` and every strategy of Lightning can read.

A run of a plain LightningModule on one rank writes it. Runs of such modules on any number of replicas read it, and also
read the files of other strategies. What this package stores in addition is under the key ``OURS``.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from lightning_megatron.checkpoint import trainer_state
from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.training.optimizer import ParameterSlice, ShardedOptimizer
from lightning_megatron.training.whole_optimizer import WholeOptimizer

State = dict[str, Any]

OURS = "lightning_megatron"


def write(state: State, path: Path) -> None:
    """Write a checkpoint, which is visible once it is complete.

    Raises:
        CheckpointError: It could not be written.
    """
    try:
        TorchCheckpointIO().save_checkpoint(state, path)
    except Exception as error:
        raise CheckpointError(
            f"{path} was not saved; earlier checkpoints are as they were. {type(error).__name__}: {error}"
        ) from error


def read(path: Path, trust: bool) -> State:
    """Read a checkpoint into host memory.

    Raises:
        CheckpointError: It holds pickled objects and is not trusted, is damaged, or is no checkpoint.
    """
    try:
        state: State = trainer_state.loads_plain(path.read_bytes())
    except pickle.UnpicklingError as error:
        if not trust:
            raise CheckpointError(
                f"{path} is no checkpoint, or holds objects whose loading can run any code ({error!s:.200}). If you"
                " trust where it comes from: MegatronStrategy(checkpointing=Checkpointing(allow_pickle=True))."
            ) from error
        state = torch.load(path, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint, and nothing of it was loaded: {error}") from error
    if not isinstance(state, dict) or "state_dict" not in state:
        raise CheckpointError(f"{path} is no checkpoint of Lightning's: it has no 'state_dict'.")
    return state


def put_optimizer(state: State, module: pl.LightningModule, optimizer: ShardedOptimizer | WholeOptimizer) -> State:
    """Put the optimizer's state into ``state`` as torch stores it, and fp32 main weights in place of rounded ones.

    Args:
        state: Lightning's state, which is changed.
        module: The module, undivided on this rank.
        optimizer: The optimizer of all its weights.

    Returns:
        The part of the optimizer's state that torch's format does not hold.
    """
    if isinstance(optimizer, WholeOptimizer):  # `state` has it as torch gives it
        return optimizer.state_dict()
    numbers = _numbers(optimizer)
    tensors: dict[int, State] = {}
    for part in optimizer.parameter_slices():
        if part.main_param in optimizer.state:
            tensors[numbers[id(part.parameter)]] = {
                name: _whole(value, part) for name, value in optimizer.state[part.main_param].items()
            }
        if part.main_param.dtype != part.parameter.dtype:
            for name in _names(module, part.parameter):
                state["state_dict"][name] = _whole(part.main_param.detach(), part)
    ours: State = state["optimizer_states"][0]
    groups = [
        {**group, "params": [numbers[id(parameter)] for parameter in parameters]}
        for group, parameters in zip(ours["groups"], optimizer.group_parameters, strict=True)
    ]
    state["optimizer_states"] = [{"state": dict(sorted(tensors.items())), "param_groups": groups}]
    return ours


def take_whole_optimizer(state: State, optimizer: WholeOptimizer, ours: State) -> None:
    """Do what ``take_optimizer`` does, for an optimizer that takes its state in torch's form.

    Args:
        state: The state as it was read, which is changed.
        optimizer: The optimizer that takes the state.
        ours: What ``put_optimizer`` returned; empty if another strategy wrote the file.
    """
    saved = state["optimizer_states"][0]
    # The groups are torch's own, so that what is changed in them is what torch loads.
    hyper = {"name": optimizer.kind, "skipped_steps": 0, **ours, "groups": saved["param_groups"]}
    state["optimizer_states"] = [{"hyper": hyper, "finish": lambda: optimizer.inner.load_state_dict(saved)}]


def take_optimizer(state: State, module: pl.LightningModule, optimizer: ShardedOptimizer, ours: State) -> None:
    """Convert the optimizer's state in ``state`` to this package's format, with a function that loads its tensors.

    Args:
        state: The state as it was read, which is changed.
        module: The module that takes the weights.
        optimizer: The optimizer that takes the state, sharded over the replicas or not.
        ours: What ``put_optimizer`` returned; empty if another strategy wrote the file.

    Raises:
        CheckpointError: The optimizer has other parameters.
    """
    saved = state["optimizer_states"][0]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
    hyper = ours or {"name": optimizer.kind, "groups": groups, "skipped_steps": 0}
    known = [number for group in saved["param_groups"] for number in group["params"]]
    numbers = dict(zip((id(p) for group in optimizer.group_parameters for p in group), known, strict=False))
    if [len(group["params"]) for group in saved["param_groups"]] != [
        len(group) for group in optimizer.group_parameters
    ]:
        raise CheckpointError(
            f"The checkpoint's optimizer has groups of {[len(g['params']) for g in saved['param_groups']]} parameters,"
            f" and this run's of {[len(group) for group in optimizer.group_parameters]}. Use the same groups, or start"
            " from the weights alone: module.load_state_dict(torch.load(path)['state_dict'])."
        )
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def finish() -> None:
        for part in optimizer.parameter_slices():
            values = saved["state"].get(numbers[id(part.parameter)], {})
            if values:
                optimizer.state[part.main_param] = {name: _part(name, value, part) for name, value in values.items()}
            if part.main_param.dtype != part.parameter.dtype:
                weight = state["state_dict"][names[id(part.parameter)]]
                part.main_param.data.copy_(_part("weight", weight, part))

    state["optimizer_states"] = [{"hyper": hyper, "finish": finish}]


def _numbers(optimizer: ShardedOptimizer) -> dict[int, int]:
    """The number that torch gives each parameter, counted through the groups, by the parameter's ``id``."""
    return {id(p): number for number, p in enumerate(p for group in optimizer.group_parameters for p in group)}


def _names(module: pl.LightningModule, parameter: torch.nn.Parameter) -> list[str]:
    return [name for name, other in module.named_parameters(remove_duplicate=False) if other is parameter]


def _whole(value: Any, part: ParameterSlice) -> Any:
    """A state tensor in the shape of its weight, if it is as large as the weight."""
    if isinstance(value, torch.Tensor) and value.numel() == part.parameter.numel() and value.dim():
        return value.view(part.parameter.shape)
    return value


def _part(name: str, value: Any, part: ParameterSlice) -> Any:
    """This rank's slice of a state tensor, on the device and in the dtype that torch's ``load_state_dict`` chooses."""
    if not isinstance(value, torch.Tensor):
        return value
    if name == "step":
        return value.clone()
    if value.numel() == part.parameter.numel() and value.dim():
        flat = value.reshape(-1)[part.start or 0 :][: part.main_param.numel()]
        return flat.view(part.main_param.shape).to(part.main_param.device).clone()
    return value.to(part.main_param.device)
