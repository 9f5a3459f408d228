"""The pytest plugin that runs Lightning's own tests on the strategy: on two tests as Lightning's are written."""

import os
import subprocess

from tests.support.pages import ROOT
from tests.support.preloaded_python import executable

LIGHTNINGS = """
import os
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import SingleDeviceStrategy
from tests.support.preloaded_python import executable

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

def fit(tmp_path, **options):
    assert not dist.is_initialized()
    assert "MASTER_PORT" not in os.environ
    trainer = Trainer(default_root_dir=tmp_path, fast_dev_run=2, **QUIET, **options)
    trainer.fit(BoringModel())
    return trainer

def test_first(tmp_path):
    trainer = fit(tmp_path)
    assert type(trainer.strategy).__name__ == "MegatronStrategy"
    assert trainer.global_step == 2
    assert dist.is_initialized()
    os.environ["LEFT_BEHIND"] = "1"

def test_second(tmp_path):
    assert "LEFT_BEHIND" not in os.environ
    assert not fit(tmp_path).strategy.cluster_environment.creates_processes_externally

def test_another_strategy(tmp_path):
    assert isinstance(fit(tmp_path, strategy="auto").strategy, SingleDeviceStrategy)
    assert not dist.is_initialized()
"""


def test_lightnings_own_tests_run_unedited(tmp_path):
    (tmp_path / "test_lightnings.py").write_text(LIGHTNINGS)
    ours = {"PL_TRAINER_STRATEGY": "megatron", "PL_TRAINER_ACCELERATOR": "cpu", "PL_TRAINER_DEVICES": "1"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"}
    run = subprocess.run(
        [executable(), "-m", "pytest", "-p", "lightning_megatron.testing", "-q", "-p", "no:cacheprovider", tmp_path],
        env={**environment, **ours, "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "3 passed" in run.stdout, run.stdout + run.stderr
