"""The command's ranks start from a server, and train, fail and end as those that are started as copies do."""

import os
import subprocess
import sys

import pytest
import yaml

from lightning_megatron.distributed import rank_server
from tests.support.pages import ROOT

FAILS = """
import lightning.pytorch as pl

class Fails(pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == {rank}:
            raise ValueError("a mistake on one rank")
"""


def fit(folder, callbacks=()):
    """What the command says of a run on two ranks, with imports of its own."""
    run = yaml.safe_load((ROOT / "examples/recipes/tiny.yaml").read_text())
    run["trainer"] |= {"devices": 2, "max_steps": 2, "logger": False, "log_every_n_steps": 1, "limit_val_batches": 0}
    run["trainer"] |= {"enable_checkpointing": False, "callbacks": list(callbacks)}
    run["trainer"]["strategy"] = {"class_path": "MegatronStrategy", "init_args": {"tp": 2}}
    run["data"]["init_args"] |= {"cache_dir": str(folder / "cache"), "paths": [str(ROOT / "lightning_megatron")]}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", rank_server.OFF: "1"}
    command = [sys.executable, "-m", "lightning_megatron", "fit", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def test_ranks_train(tmp_path):
    code, told = fit(tmp_path)
    assert code == 0, told
    assert "Starting 2 ranks" in told
    assert "`max_steps=2` reached" in told


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_all_with_its_error(rank, tmp_path):
    (tmp_path / "mine.py").write_text(FAILS.format(rank=rank))
    code, told = fit(tmp_path, [{"class_path": "mine.Fails"}])
    assert code != 0
    assert "a mistake on one rank" in told
    assert "mine.py" in told
    assert len(told.splitlines()) < 60, told
