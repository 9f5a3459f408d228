"""How the ranks start: a server for notebooks, torchrun, SLURM and other environments."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, LSFEnvironment, SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from torch.utils.data import DataLoader

from lightning_megatron import MegatronPrecision, MegatronStrategy
from lightning_megatron.strategy.launchers import worker_pool
from tests.support.pages import ROOT
from tests.support.plain_module import PlainModule
from tests.support.preloaded_python import executable
from tests.support.ranks import free_port
from tests.support.trainer import QUIET

SCRIPTS = ROOT / "tests/support/scripts"


def _environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, **more}


def test_an_interactive_session(tmp_path):
    pytest.importorskip("cloudpickle")
    with (SCRIPTS / "notebook_session.py").open() as lines:
        run = subprocess.run(
            [sys.executable, "-i"], stdin=lines, cwd=tmp_path, env=_environment(), capture_output=True, text=True
        )
    assert (tmp_path / "told.json").exists(), run.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert len(told["losses"]) == told["steps"] == 8
    assert told["epochs"] == 2
    assert told["best"].endswith("kept/best.ckpt")
    assert (tmp_path / told["log"] / "metrics.csv").exists()
    assert told["validated"] == pytest.approx(told["fitted"], rel=1e-6)
    assert told["predicted"] == [8, 16, 32]
    assert told["steps_after_another_epoch"] == len(told["losses_after_another_epoch"]) == 12
    assert told["losses_after_another_epoch"][8] < told["losses"][0]  # it went on from the trained weights
    assert told["by_another_trainer"] == pytest.approx(told["fitted_again"], rel=1e-6)
    assert told["from_the_copy"] == pytest.approx(told["fitted"], rel=1e-6)
    assert "OSError: the disk is gone" in run.stderr
    end = run.stderr[run.stderr.index("MegatronStrategy: of 2 ranks, rank ") :].splitlines()
    assert end[1].startswith("  in a cell of the notebook, line ")
    assert end[1].endswith(", in get_batch")
    assert "in get_batch" in Path(end[3].removeprefix("  Tracebacks: ")).read_text()  # the rank's own traceback


def _answer(rank_to_kill: str | None) -> str:
    if os.environ["LOCAL_RANK"] == rank_to_kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank_to_kill is not None:
        signal.pause()  # as a collective that waits for a peer
    return os.environ["LOCAL_RANK"]


def _run(rank_to_kill: str | None) -> list[str]:
    from functools import partial

    return worker_pool.run(partial(_answer, rank_to_kill), [{**os.environ, "LOCAL_RANK": str(rank)} for rank in (0, 1)])


def test_each_process_has_its_environment():
    assert _run(None) == ["0", "1"]


def test_a_killed_rank_ends_the_others_and_is_named():
    with pytest.raises(worker_pool.RankDiedError, match="rank 1 was ended by SIGKILL"):
        _run("1")


def test_a_plain_module_comes_back_trained():
    torch.manual_seed(1)
    x = torch.randn(16, 4)
    rows = [{"x": row, "y": row[:1]} for row in x]
    module = PlainModule()
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.05)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=MegatronStrategy(launch="forkserver"), max_epochs=2, **QUIET
    )
    trainer.fit(module, DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=8))
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    with torch.no_grad():
        loss = (module.layers(x) - x[:, :1]).square().mean()
    validated = Trainer(accelerator="cpu", devices=1, **QUIET).validate(module, DataLoader(rows, batch_size=8))
    torch.testing.assert_close(torch.tensor(validated[0]["unseen"]), loss)


def test_ways_that_do_not_work_are_refused(monkeypatch):
    with pytest.raises(Exception, match="'subprocess' .a script., 'forkserver'"):
        MegatronStrategy(launch="spawn")
    with pytest.raises(Exception, match="one machine"):
        Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=MegatronStrategy(launch="forkserver"))
    monkeypatch.setattr("lightning_megatron.distributed.lightning_private._IS_INTERACTIVE", True)
    with pytest.raises(Exception, match="launch='forkserver', or leave launch out"):
        Trainer(accelerator="cpu", devices=2, strategy=MegatronStrategy(launch="subprocess"))


_TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
_SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
_LSF = {"LSB_JOBID": "7", "LSB_DJOB_RANKFILE": "", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({**_TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}, TorchElasticEnvironment),
        ({**_SLURM, "SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "2"}, SLURMEnvironment),
        ({**_LSF, "JSM_NAMESPACE_RANK": "1"}, LSFEnvironment),
    ],
)
def test_an_environment_that_starts_the_processes(variables, kind, monkeypatch, tmp_path):
    if kind is LSFEnvironment:
        (tmp_path / "hosts").write_text("batch\nhere\nhere\n")
        variables["LSB_DJOB_RANKFILE"] = str(tmp_path / "hosts")
        monkeypatch.setattr("socket.gethostname", lambda: "here")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    strategy = Trainer(accelerator="cpu", devices=2, strategy=MegatronStrategy(pp=2), **QUIET).strategy
    assert type(strategy.cluster_environment) is kind
    assert strategy.launcher is None
    assert strategy.pipeline_parallel_rank == strategy.global_rank == 1
    with pytest.raises(Exception, match="started already"):
        Trainer(accelerator="cpu", devices=2, strategy=MegatronStrategy(pp=2, launch="forkserver"), **QUIET)


def test_one_process_that_srun_has_not_started():
    trainer = Trainer(accelerator="cpu", devices=1, strategy=MegatronStrategy(), plugins=[SLURMEnvironment()], **QUIET)
    assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment)
    assert (trainer.global_rank, trainer.node_rank, trainer.world_size) == (0, 0, 1)


def test_an_environment_of_the_users():
    class Ours(LightningEnvironment):
        creates_processes_externally = True

    trainer = Trainer(accelerator="cpu", devices=2, strategy=MegatronStrategy(pp=2), plugins=[Ours()], **QUIET)
    assert type(trainer.strategy.cluster_environment) is Ours
    assert trainer.strategy.launcher is None


def test_precision_objects():
    trainer = Trainer(accelerator="cpu", strategy="megatron", plugins=[MixedPrecision("bf16-mixed", "cpu")], **QUIET)
    assert isinstance(trainer.strategy.precision_plugin, MegatronPrecision)
    double = Trainer(accelerator="cpu", strategy="megatron", plugins=[DoublePrecision()], **QUIET)
    assert double.strategy.precision_plugin.compute_dtype == torch.float64

    class OwnPrecision(Precision):
        precision = "8-true"

    with pytest.raises(Exception, match="precision='8-true' .OwnPrecision."):
        Trainer(accelerator="cpu", strategy="megatron", plugins=[OwnPrecision()], **QUIET)


def test_a_checkpoint_io_is_refused():
    with pytest.raises(Exception, match="TorchCheckpointIO.*shard"):
        Trainer(accelerator="cpu", strategy="megatron", plugins=[TorchCheckpointIO()], **QUIET)


def test_fabric_is_answered():
    with pytest.raises(ValueError, match=r"MegatronStrategy\(tp=2\) for lightning.pytorch.Trainer; Fabric has no"):
        lightning.Fabric(strategy=MegatronStrategy(tp=2))


def test_the_constructor_leaves_torch_distributed_alone():
    code = (
        "import sys, torch.distributed as dist, lightning_megatron as lm\n"
        "lm.MegatronStrategy  # imports what it needs\n"
        "def forbid(frame, event, arg):\n"
        "    assert 'torch/distributed' not in frame.f_code.co_filename, frame.f_code\n"
        "sys.setprofile(forbid)\n"
        "lm.MegatronStrategy(tp=2, pp=2, vp=2)\n"
        "sys.setprofile(None)\n"
        "assert not dist.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


TWO_RANKS = str(SCRIPTS / "two_ranks_script.py")


def _told(*runs: subprocess.Popen) -> dict:
    """What rank 0 printed last, once all have ended well."""
    try:
        outputs = [run.communicate(timeout=120) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(run.returncode == 0 for run in runs), outputs
    return next(json.loads(out.splitlines()[-1]) for out, _ in outputs if out.strip().endswith("}"))


def _start(*command: str, **variables: str) -> subprocess.Popen:
    # Lightning's environments, asked in the tests above, leave an address behind in this process.
    environment = {name: value for name, value in _environment().items() if not name.startswith("MASTER_")}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_script_torchrun_and_slurm_train_the_same():
    alone = _told(_start(sys.executable, TWO_RANKS))
    launcher = [
        executable(),
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    by_torchrun = _told(_start(*launcher, TWO_RANKS))
    job = {
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"},
        **{"SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port())},
    }
    tasks = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    by_slurm = _told(*[_start(executable(), TWO_RANKS, **task) for task in tasks])
    assert [told["by"] for told in (alone, by_torchrun, by_slurm)] == [
        "LightningEnvironment",
        "TorchElasticEnvironment",
        "SLURMEnvironment",
    ]
    assert len(alone["losses"]) == 3
    assert alone["losses"] == by_torchrun["losses"] == by_slurm["losses"]
