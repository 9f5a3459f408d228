"""What no test leaves to the next."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _environment_variables_stay() -> Iterator[None]:
    """Puts `os.environ` back: Lightning's environments write MASTER_ADDR, which the next test would obey."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
