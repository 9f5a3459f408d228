"""The rings of tests, how they share the processor, and what no test leaves to the next.

``pytest`` alone runs the quick ring: the tests of ``unit`` and ``trainer`` but for those marked ``slow``, and the tests
elsewhere that are marked ``quick``. ``pytest --all``, ``-m`` or a path runs what it names. Without a path the files
are shared out to as many workers as there are processors, four at most; ``-n 0`` runs all in one process.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers and ranks share the processors


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every test, not the quick ring alone")


def pytest_configure(config: pytest.Config) -> None:
    named = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.markexpr or config.option.all
    config.quick_ring_only = getattr(config, "workerinput", {}).get("quick_ring_only", not named)


def pytest_configure_node(node: Any) -> None:
    """A worker of pytest-xdist is given paths, so that it cannot tell by itself whether the user gave any."""
    node.workerinput["quick_ring_only"] = node.config.quick_ring_only


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        config.option.dist = "no"
        return 0
    return min(len(os.sched_getaffinity(0)), 4)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(TESTS).parts[0]
        item.add_marker(kind)
        if kind in ("unit", "trainer") and not item.get_closest_marker("slow"):
            item.add_marker("quick")
    if config.quick_ring_only:
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("quick")])
        items[:] = [item for item in items if item.get_closest_marker("quick")]


@pytest.fixture(autouse=True, scope="module")
def _no_process_groups_stay() -> Iterator[None]:
    """Ends those that a test has made in this process, where the next one makes its own, and the pools of ranks."""
    yield
    if "tests.support.ranks" in sys.modules:
        sys.modules["tests.support.ranks"].close_pools()
    if "lightning_megatron.distributed.process_groups" in sys.modules:
        sys.modules["lightning_megatron.distributed.process_groups"].destroy()


@pytest.fixture(autouse=True)
def _environment_variables_stay() -> Iterator[None]:
    """Puts `os.environ` back: Lightning's environments write MASTER_ADDR, which the next test would obey."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def preloaded_python() -> Iterator[None]:
    """What a test, and its ranks, start as ``sys.executable`` has imported the package already."""
    from tests.support.preloaded_python import executable

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", executable())
        yield
