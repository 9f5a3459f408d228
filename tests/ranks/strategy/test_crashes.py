"""One of four ranks fails: the terminal ends with a few lines that say which, where and why, and no rank is left."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.pages import ROOT
from tests.support.preloaded_python import executable
from tests.support.ranks import free_port

SCRIPT = ROOT / "tests/support/scripts/crashing_script.py"
RANK_2 = "MegatronStrategy: of 4 ranks, rank 2 (pipeline stage 1, tensor rank 0, replica 0) failed first."
SHAPES = "RuntimeError: inconsistent tensor size"
MOST = 20  # lines of the whole terminal, without the note of torchrun


def crash(folder: Path, how: str, launch: str) -> tuple[int, list[str]]:
    """The exit code, and the lines of the terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    python = executable()
    alone = [python, str(SCRIPT), how, "external" if launch in ("torchrun", "slurm") else launch]
    if launch == "torchrun":
        port = environment["MASTER_PORT"]
        alone = [python, "-m", "torch.distributed.run", "--nproc-per-node=4", f"--master-port={port}", *alone[1:]]
    log = folder / "log"
    with log.open("w") as out:
        runs = []
        for rank in range(4 if launch == "slurm" else 1):
            slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
                     "SLURM_JOB_ID": environment["MASTER_PORT"], "SLURM_JOB_NAME": "train",
                     "SLURM_NTASKS_PER_NODE": "4"}  # fmt: skip
            more = {**slurm, "MASTER_ADDR": "127.0.0.1"} if launch == "slurm" else {}
            options = {"stdout": out, "stderr": out, "cwd": folder, "env": {**environment, **more}}
            runs.append(subprocess.Popen(alone, **options))
        try:
            codes = [run.wait(100) for run in runs]
        finally:
            for run in runs:
                run.kill()
    assert len({code == 0 for code in codes}) == 1
    return max(codes, key=abs), log.read_text().splitlines()


def told(lines: list[str]) -> list[str]:
    """The summary, and what is behind it; it is there once."""
    begin = [number for number, line in enumerate(lines) if line.startswith("MegatronStrategy: of ")]
    assert len(begin) == 1, "\n".join(lines)
    return lines[begin[0] :]


def line_of(comment: str) -> int:
    return next(n for n, line in enumerate(SCRIPT.read_text().splitlines(), 1) if line.endswith(comment))


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("how", "comment", "function", "what"),
    [
        ("step", "# the step's line", "training_step", SHAPES),
        ("worker", "# the dataset's line", "__getitem__", "IndexError: list index out of range (in a worker of"),
        ("build", "# the line of configure_model", "configure_model", "FileNotFoundError: [Errno 2] No such file"),
    ],
)
def test_the_end_says_which_rank_failed_where_and_why(tmp_path, how, comment, function, what):
    code, lines = crash(tmp_path, how, "subprocess")
    assert code == 1
    assert len(lines) <= MOST, "\n".join(lines)
    first, place, error, file = told(lines)
    assert first == RANK_2
    assert place.startswith(f'  File "{SCRIPT}", line {line_of(comment)}, in {function}: ')
    assert error.startswith(f"  {what}")
    tracebacks = Path(file.removeprefix("  Tracebacks: ")).read_text()
    assert re.search(rf"^Rank 2, process \d+\nTraceback.*in {function}\n", tracebacks, re.MULTILINE | re.DOTALL)
    assert tracebacks.startswith(RANK_2)
    assert len(list(tmp_path.iterdir())) == 2  # the file and the log


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("killed", "It was ended by SIGKILL, without a Python error. This often means"),
        ("exit", "SystemExit: 3"),
    ],
)
def test_a_rank_that_ends_without_an_error(tmp_path, how, what):
    code, lines = crash(tmp_path, how, "subprocess")
    assert code == 1
    assert len(lines) <= MOST, "\n".join(lines)
    end = told(lines)
    assert end[0] == RANK_2
    assert any(line.startswith(f"  {what}") for line in end)
    assert len(end) <= 6


@pytest.mark.timeout(200)
@pytest.mark.parametrize("launch", ["subprocess", "torchrun", "slurm"])
def test_an_error_of_all_ranks_is_told_once(tmp_path, launch):
    code, lines = crash(tmp_path, "all", launch)
    assert code == 1
    text = "\n".join(lines)
    ours = [line for line in lines if SHAPES in line]
    assert len(ours) == (2 if launch == "torchrun" else 1), text  # torchrun ends with it, too
    assert f"line {line_of('# the step' + chr(39) + 's line')}, in training_step" in text
    assert "[rank" not in text
    if launch == "torchrun":
        assert "traceback : MegatronStrategy: of 4 ranks" in text
    else:
        assert len(lines) <= MOST, text


@pytest.mark.timeout(200)
def test_the_advice_for_a_lack_of_memory_comes_before(tmp_path):
    _, lines = crash(tmp_path, "memory", "subprocess")
    end = told(lines)
    assert end[2] == "  OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert "Training takes, by the sizes of GPTConfig:" in lines[: -len(end)]
    assert len(lines) <= MOST + 16, "\n".join(lines)


@pytest.mark.timeout(200)
def test_the_first_rank_is_killed(tmp_path):
    code, lines = crash(tmp_path, "first rank killed", "subprocess")
    assert code == -9
    assert len(lines) <= MOST, "\n".join(lines)


@pytest.mark.timeout(200)
def test_an_error_that_is_caught_is_the_error_itself(tmp_path):
    code, lines = crash(tmp_path, "caught", "subprocess")
    assert code == 7
    assert any(line.startswith("caught inconsistent tensor size") for line in lines)
    assert "MegatronStrategy: of" not in "\n".join(lines)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
