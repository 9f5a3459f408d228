"""A script in the middle of its training: Ctrl-C, and a rank that is killed. No process is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.pages import ROOT

SCRIPT = ROOT / "tests/support/scripts/endless_script.py"
LIMIT = 30  # seconds until every rank has ended


def processes(group: int) -> list[int]:
    """The running processes of a process group, the first one (rank 0) first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, fields = stat.read_text().rsplit(")", 1)
        except OSError:  # it ended meanwhile
            continue
        state, _, its_group = fields.split()[:3]
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.fixture(params=["subprocess", "forkserver"])
def training(tmp_path, request):
    """``endless_script.py`` in the middle of its training, in a process group of its own."""
    log = tmp_path / "log"
    with log.open("w") as out:
        command = [sys.executable, SCRIPT, request.param]
        run = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while "step 3" not in log.read_text():
            assert run.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield run, log, request.param
    finally:
        for process in processes(run.pid):
            os.kill(process, signal.SIGKILL)


def wait_for_all(run: subprocess.Popen) -> None:
    deadline = time.monotonic() + LIMIT
    while processes(run.pid):
        run.poll()
        assert time.monotonic() < deadline, f"still running: {processes(run.pid)}"
        time.sleep(0.2)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_ends_all_ranks(training):
    run, log, _ = training
    assert len(processes(run.pid)) >= 4
    os.killpg(run.pid, signal.SIGINT)
    wait_for_all(run)
    assert "KeyboardInterrupt" in log.read_text()


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_ends_all_ranks(training):
    run, log, _ = training
    os.kill(processes(run.pid)[-1], signal.SIGKILL)
    wait_for_all(run)
    assert run.wait() != 0
    assert "It was ended by SIGKILL, without a Python error." in log.read_text()
