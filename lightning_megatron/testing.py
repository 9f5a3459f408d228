"""A pytest plugin, ``-p lightning_megatron.testing``: Lightning's own tests, run on ``strategy="megatron"``.

Importing it registers the strategy. Each test leaves the process as it found it: the process groups, megatron-core's
global state, the bending of it to the CPU, and the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import lightning_megatron  # noqa: F401  (registers the strategy)
from lightning_megatron.distributed import device, process_groups

__all__ = ["clean_process", "leave_no_groups"]


def leave_no_groups() -> None:
    """End the process groups, megatron-core's first, and let megatron-core be as without a strategy."""
    process_groups.destroy()
    device.use_device(torch.device("meta"))  # any but the CPU undoes what was done for it


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Around each test: no process group before or after it, and the environment as it was."""
    leave_no_groups()
    environment = dict(os.environ)
    yield
    leave_no_groups()
    for name in set(os.environ) - set(environment):
        if name != "PYTEST_CURRENT_TEST":
            del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"})
