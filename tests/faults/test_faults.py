"""Real processes, real ``kill -9``, files that are spoilt and disks that fill up: what is counted is losses, and their
number is to be 0. A loss: a checkpoint under its name that is not whole, a newest one older than before, or a final
weight that differs from the uninterrupted run's.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_megatron import Checkpointing
from lightning_megatron.checkpoint import manifest, newest
from tests.support import ranks, victim
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_ranks
from tests.support.small_gpt import fit, spoil


def whole_steps(folder: Path) -> tuple[list[int], list[str]]:
    """Steps of the whole checkpoints, and what is visible and not whole."""
    steps, broken = [], []
    for path in folder.iterdir() if folder.exists() else ():
        if path.name == manifest.UNFINISHED:
            continue
        try:
            about = manifest.read(path)
            wrong = manifest.find_damage(path, about, list(about["files"]), checksums=True)
        except manifest.CheckpointError as error:
            wrong = [str(error)]
        if wrong:
            broken += wrong
        else:
            steps.append(about["global_step"])
    return sorted(steps), broken


def killed(function, *args, mark: Path, after: float | None, one: bool) -> bool:
    """Start the ranks, and kill one or all of them ``after`` seconds of training, or wait for them to die."""
    world = victim.LAYOUT.world_size
    mark.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as results:
        port = ranks.free_port()
        processes = [
            ranks._context.Process(
                target=ranks._rank, args=(rank, world, port, results, sys.executable, function, args)
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 90
        while not mark.exists() and all(p.is_alive() for p in processes) and time.monotonic() < deadline:
            time.sleep(0.005)
        if after is not None:
            time.sleep(after)
            for process in processes[:1] if one else processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join(60)
        for process in processes:
            process.kill()
            process.join()
        return not (Path(results) / "0").exists()


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    return run_ranks(2, victim.train, str(folder), str(folder / "mark"), False)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(25 * victim.KILLS)
def test_killed_at_random_moments(tmp_path, truth):
    folder, mark = tmp_path / "kept", tmp_path / "mark"
    chance = random.Random(os.environ.get("FAULT_SEED", "11"))
    faults, losses, last = 0, [], 0
    for number in range(victim.KILLS):
        after = chance.uniform(0, 0.25)
        if not killed(
            victim.train, str(folder), str(mark), number % 2 == 1, mark=mark, after=after, one=number % 3 == 0
        ):
            break  # it had come to its end
        faults += 1
        steps, broken = whole_steps(folder)
        losses += broken
        if last and (not steps or steps[-1] < last):
            losses.append(f"step {last} was saved, and now there is {steps}")
        last = steps[-1] if steps else 0
    resumed = run_ranks(2, victim.train, str(folder), str(mark), False)
    for rank, expected in zip(resumed, truth, strict=True):
        losses += [name for name, value in expected.items() if not torch.equal(rank[name], value)]
    print(f"{faults} faults, {len(losses)} losses; step {last} of {victim.STEPS} was reached by way of them")
    assert not losses
    assert faults >= victim.KILLS * 5 // 6
    assert manifest.leftovers(folder) == [], "the next saves clean up"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_each_thing_that_a_save_does(tmp_path):
    """From making the directory to removing the checkpoint before: the one at step 1 or a newer one is always whole."""
    survived, at = [], 1
    while at < 40:
        folder, mark = tmp_path / str(at), tmp_path / f"mark{at}"
        if not killed(victim.train_and_die, str(folder), str(mark), at, 2, mark=mark, after=None, one=False):
            break
        steps, broken = whole_steps(folder)
        assert not broken, (at, broken)
        assert steps, at
        survived.append(steps[-1])
        at += 1
    print(f"{len(survived)} faults, 0 losses; the newest whole step after each: {survived}")
    assert set(survived) == {1, 2}
    assert len(survived) >= 10


def _fill(folder, size, on_save_error):
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    strategy = {"checkpointing": Checkpointing(on_save_error=on_save_error)}
    run, _ = fit(Layout(tp=2), 6, callbacks=[keep], strategy=strategy)
    return run.global_step


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of two megabytes: three checkpoints and a part of the fourth."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
def test_a_full_disk(tiny_disk, on_save_error):
    if on_save_error == "raise":
        with pytest.raises(RankError, match="was not saved; earlier checkpoints are as they were.*No space left"):
            run_ranks(2, _fill, str(tiny_disk), 0, on_save_error)
    else:
        assert run_ranks(2, _fill, str(tiny_disk), 0, on_save_error) == [6, 6]
    steps, broken = whole_steps(tiny_disk)
    assert steps == list(range(1, len(steps) + 1))
    assert 1 <= len(steps) < 6
    assert not broken


def _read_only(folder):
    _fill(folder, 0, "raise")


def test_a_directory_that_cannot_be_written(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / manifest.UNFINISHED).write_text("root may write everywhere, so a file is in the directory's place")
    with pytest.raises(RankError, match="Nothing can be saved to"):
        run_ranks(2, _read_only, str(folder))


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_the_newest_is_spoilt_and_the_one_before_is_taken(tmp_path, how):
    folder = tmp_path / "kept"
    run_ranks(2, victim.train, str(folder), str(tmp_path / "mark"), False, 2)
    shutil.copytree(next(folder.glob("step=2.ckpt")), folder / "step=1.ckpt")
    spoil(folder / "step=2.ckpt", how)
    expected = "step=2.ckpt" if how == "flipped" else "step=1.ckpt"  # a flipped bit shows only when it is read
    assert newest(folder).name == expected
    if how == "flipped":
        with pytest.raises(RankError, match="its checksum differs"):
            run_ranks(2, victim.train, str(folder), str(tmp_path / "mark"), False, 3)
