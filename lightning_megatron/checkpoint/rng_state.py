"""Saves and restores the random states of a rank: Python, NumPy, torch, and megatron-core's for the model."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from lightning_megatron.distributed.device import model_rng

States = dict[str, Any]


def data_states() -> States:
    """The states that data loading draws from, as plain containers and tensors."""
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = state
    numpy = (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss))
    version, internal, waiting = random.getstate()
    python = (
        version,
        torch.tensor(internal, device="cpu"),
        waiting,
    )  # as a tensor: hundreds of numbers are slow to pickle
    return {"python": python, "numpy": numpy, "torch": torch.get_rng_state()}


def set_data_states(states: States) -> None:
    """Restore what ``data_states`` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])


def model_states() -> States:
    """The states that the model (dropout) draws from on this rank."""
    states: States = {"tracker": dict(get_cuda_rng_tracker().get_states())}
    with model_rng():
        states["model"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_model_states(states: States) -> None:
    """Restore what ``model_states`` returned."""
    get_cuda_rng_tracker().set_states(dict(states["tracker"]))
    with model_rng():
        torch.set_rng_state(states["model"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def snapshot() -> States:
    """All random states of this rank."""
    return {"data": data_states(), "model": model_states()}


def restore(states: States) -> None:
    """Restore what ``snapshot`` returned."""
    # With a GPU the model has no state of its own on the host: "model" is the data's state, so "data" is set last.
    set_model_states(states["model"])
    set_data_states(states["data"])
