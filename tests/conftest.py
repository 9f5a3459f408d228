"""What no test leaves to the next."""

import os
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_process_groups_stay() -> Iterator[None]:
    """Ends those that a test has made in this process, where the next one makes its own."""
    yield
    if "lightning_megatron.distributed.process_groups" in sys.modules:
        sys.modules["lightning_megatron.distributed.process_groups"].destroy()


@pytest.fixture(autouse=True)
def _environment_variables_stay() -> Iterator[None]:
    """Puts `os.environ` back: Lightning's environments write MASTER_ADDR, which the next test would obey."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
