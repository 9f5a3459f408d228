"""``benchmarks/gpu.py`` on the CPU, with tiny models: the code that is to run on a GPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.pages import ROOT


def _run(folder, *arguments, code=0):
    """What the benchmark wrote into its folder; it ended with ``code``."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny", "--out", folder, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "gpu.json").read_text())["rows"]


def test_rows_of_all_sides(tmp_path):
    """A loop by hand trains as the Trainer does; the table has a line for each row."""
    wanted = r"^124M: (plain|by hand on megatron-core|transformers, eager)$|^8B, LoRA: defaults$"
    told, rows = _run(tmp_path, "--only", wanted, "--profile")
    assert [row["name"] for row in rows] == ["plain", "by hand on megatron-core", "defaults", "transformers, eager"]
    assert not [row for row in rows if "error" in row], rows
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert all(row["shares"]["matrix products"] > 0 for row in rows)
    assert "matrix products" in told
    table = (tmp_path / "gpu.md").read_text()
    assert table in told
    assert table.count("\n| 124M | ") == 3


FAILURES = """
import os, time
from functools import partial
from pathlib import Path

import gpu

if __name__ == "__main__":
    gpu.PRELOADED.clear()
    processes = gpu.Processes(Path("log"))
    for call in (partial(int, "no number"), partial(os._exit, 3), partial(time.sleep, 60), partial(dict, fine=1)):
        print(processes.run(call, 3))
"""


def test_a_row_that_fails_says_so(tmp_path):
    """It raises, its process dies, or it is not done in time; the next row runs all the same."""
    (tmp_path / "failures.py").write_text(FAILURES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "failures.py"]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert told.stdout.splitlines() == [
        """{'error': "ValueError: invalid literal for int() with base 10: 'no number'"}""",
        "{'error': 'its process ended with exit code 3'}",
        "{'error': 'not done in 3 s'}",
        "{'fine': 1}",
    ]
