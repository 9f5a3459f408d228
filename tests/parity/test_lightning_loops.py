"""Loops, hooks, counters and logs are vanilla Lightning's, whatever the layout.

The truth is a plain LightningModule on one process that trains the same GPT on the same batches. Losses may differ by
fp32 rounding (1e-5 relative, see ``test_truth.py``); all else is equal.
"""

import csv
import functools
import io

import pytest

from tests.support import lightning_runs
from tests.support.layout import Layout
from tests.support.lightning_runs import CASES
from tests.support.ranks import run_ranks

# A short last window is divided by its own tokens here (as one big batch would be), by the full window in Lightning:
# Adam, nearly blind to the scale of gradients, makes little of it.
EXACTNESS = dict.fromkeys(CASES, 1e-5) | {"accumulate": 1e-3, "accumulation schedule": 1e-3}
LAYOUTS = [Layout(tp=2, pp=2, vp=2), Layout(tp=2, dp=2)]


@functools.cache
def vanilla():
    return run_ranks(1, lightning_runs.run_all, None)[0]


@functools.cache
def ours(layout):
    return run_ranks(layout.world_size, lightning_runs.run_all, layout, timeout=280)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_as_vanilla_lightning(layout, case):
    expected = vanilla()[case]
    for rank in ours(layout):
        seen = rank[case]
        for name in ("callback hooks", "module hooks", "global_step", "current_epoch", "progress", "rates"):
            assert seen[name] == expected[name], name
        for name in ("estimated", "training"):
            assert seen[name] == expected[name], name
        assert seen["losses"] == pytest.approx(expected["losses"], rel=EXACTNESS[case])
        assert seen["metrics"] == pytest.approx(expected["metrics"], rel=EXACTNESS[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_log_file_is_the_same(layout, case):
    assert _table(ours(layout)[0][case]["csv"]) == [
        {name: pytest.approx(value, rel=EXACTNESS[case]) for name, value in row.items()}
        for row in _table(vanilla()[case]["csv"])
    ]


def _table(text):
    return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(io.StringIO(text))]
