"""The examples run as their readers run them: a few steps of tiny models, in processes of their own."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ["--hidden-size", "32", "--seq-length", "32", "--batch-size", "4"]


def run(script: str, folder: Path, *options: str) -> str:
    """What the script said, in ``folder``, where its caches are too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, str(ROOT / script), *options]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stderr + ended.stdout


def number(name: str, printed: str) -> float:
    """What follows ``name`` in the one line that begins with it."""
    (value,) = re.findall(rf"^{name} ([\d.]+)", printed, re.MULTILINE)
    return float(value)


def curves(file: Path) -> dict[str, int]:
    """How many points each curve has."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {name: sum(bool(row[name]) for row in rows) for name in rows[0]}


@pytest.mark.slow
def test_gpt(tmp_path):
    printed = run("examples/train_gpt.py", tmp_path, "--steps", "4", "--devices", "2", "--pp", "1", "--log", "log")
    assert 3 < number("val_loss", printed) < 6
    assert (tmp_path / "checkpoints/gpt-stdlib/manifest.json").is_file()
    assert curves(tmp_path / "log/metrics.csv").items() >= {"train_loss": 2, "val_loss": 4}.items()


@pytest.mark.slow
def test_bert(tmp_path):
    options = ["--packages", "json", "http", "--vocab-size", "300", "--steps", "4", "--classify-steps", "4"]
    printed = run("examples/train_bert.py", tmp_path, *TINY, *options)
    assert 3 < number("val_mlm_loss", printed) < 8
    assert 0 <= number("val_accuracy", printed) <= 1
    assert re.search(r"Not loaded from .*pretraining/checkpoint.*\n  model\.(pooler|lm_head)", printed)
    assert "embedding" not in printed
    output = tmp_path / "checkpoints/bert-stdlib"
    for phase in ("pretraining", "classifier"):
        assert (output / phase / "checkpoint/manifest.json").is_file()
        assert (output / phase / "metrics.csv").is_file()


@pytest.mark.slow
def test_t5(tmp_path):
    text = Path(os.__file__).parent / "email"
    options = ["--text", str(text), "--vocab-size", "400", "--steps", "4"]
    printed = run("examples/train_t5.py", tmp_path, *TINY, *options)
    assert 3 < number("val_loss", printed) < 10
    corrupted, taken_out, filled_in = printed.split("\n--- ")[1:]
    assert "<extra_id_0>" in corrupted
    assert "<extra_id_0>" in taken_out
    assert filled_in.startswith("filled in\n")
    assert (tmp_path / "checkpoints/t5-stdlib/denoising/checkpoint/manifest.json").is_file()


@pytest.mark.slow
def test_pictures(tmp_path):
    table = "epoch,step,train_loss,val_loss\n0,0,5.5,\n0,1,,5.0\n0,1,4.5,\n"
    (tmp_path / "metrics.csv").write_text(table)
    run("docs/draw_curves.py", tmp_path, "curves.png", "a run=metrics.csv", "--title", "A run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
