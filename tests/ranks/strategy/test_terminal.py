"""What four ranks print while nothing is wrong: a line of what runs, the summary, the bar and the results."""

import os
import subprocess
import sys

import pytest

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.strategy.run_line import run_line
from lightning_megatron.training.microbatches import MicroBatchSizes
from tests.support.pages import ROOT
from tests.support.preloaded_python import executable

NOISE = (
    "Tip:", "Initializing distributed", "All distributed processes registered", "distributed_backend=", "weights_only",
    "/-2", "FLOPs", "Flops", "TPU available", "GPU available: False", "[rank: ", "Warning:", "Skipping val loop",
)  # fmt: skip
MOST = 28  # lines


@pytest.mark.timeout(200)
@pytest.mark.skipif(sys.platform != "linux", reason="starts ranks from a preloaded interpreter")
def test_a_fit_prints_only_what_helps(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    script = ROOT / "tests/support/scripts/quiet_script.py"
    run = subprocess.run(
        [executable(), str(script)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=180,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    lines = run.stdout.splitlines()
    assert lines.count("4 ranks: tp=2, pp=2, dp=1 over gloo; 4 micro-batches of 2") == 1, run.stdout
    assert lines.count("Seed set to 1") == 1
    assert not [line for line in lines for noise in NOISE if noise in line], run.stdout
    for needed in ("Total params: 42.9 K", "max_steps=6` reached", "val_loss", "Epoch 0 "):
        assert needed in run.stdout
    assert len(lines) <= MOST, run.stdout


@pytest.mark.parametrize(
    ("sizes", "cut", "counts_rows", "line"),
    [
        ({"tp": 2, "pp": 2}, (2,) * 8, True, "4 ranks: tp=2, pp=2, dp=1 over gloo; 8 micro-batches of 2"),
        ({"pp": 2, "vp": 2}, (3,) * 4, True, "4 ranks: tp=1, pp=2, vp=2, dp=2 over gloo; 4 micro-batches of 3"),
        (
            {"pp": 2, "layers_per_stage": [5, 3]},
            (2,) * 8,
            True,
            "4 ranks: tp=1, pp=2, dp=2, layers_per_stage=[5, 3] over gloo; 8 micro-batches of 2",
        ),
        ({"world_size": 1}, (8,), True, "1 rank; 1 micro-batch of 8"),
        ({"world_size": 2}, (1,), False, "2 ranks: tp=1, pp=1, dp=2 over gloo; 1 micro-batch"),
    ],
)
def test_the_line_of_what_runs(sizes, cut, counts_rows, line):
    assert run_line(ParallelLayout(**{"world_size": 4, **sizes}), "gloo", MicroBatchSizes(cut), counts_rows) == line
