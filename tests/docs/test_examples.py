"""docs/examples.md's commands run as it gives them, in processes of their own; but for a few steps of tiny models."""

import csv
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lightning_megatron.cli import MegatronCLI
from lightning_megatron.cli.check.run_check import check_run
from tests.support.pages import ROOT, blocks, shell
from tests.support.preloaded_python import executable

TINY = ["--hidden-size", "32", "--seq-length", "32", "--batch-size", "4"]


def commands(script: str) -> list[list[str]]:
    """The options of each of the page's commands that run ``script``."""
    lines = "".join(blocks("examples.md", "bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    assert all(words[0] == "python" and (ROOT / words[1]).is_file() for words in found)
    return [options for _, name, *options in found if name == script]


def run(script: str, folder: Path, *options: str) -> str:
    """What the script said, in ``folder``, where its caches are too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [executable(), str(ROOT / script), *options]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stderr + ended.stdout


def drawn() -> list[str]:
    """The tables that the page draws."""
    words = (word for options in commands("docs/draw_curves.py") for word in options)
    return [word.rpartition("=")[2] for word in words if word.endswith(".csv")]


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
    (options,) = commands("examples/train_gpt.py")
    printed = run("examples/train_gpt.py", tmp_path, *options, "--steps", "4", "--devices", "2", "--pp", "1")
    assert 3 < number("val_loss", printed) < 6
    assert (tmp_path / "checkpoints/gpt-stdlib/manifest.json").is_file()
    assert curves(tmp_path / drawn()[0]).items() >= {"train_loss": 2, "val_loss": 4}.items()


@pytest.mark.slow
def test_bert(tmp_path):
    tiny = [*TINY, "--packages", "json", "http", "--vocab-size", "300", "--steps", "4", "--classify-steps", "4"]
    both, from_scratch = (
        run("examples/train_bert.py", tmp_path, *options, *tiny) for options in commands("examples/train_bert.py")
    )
    assert 3 < number("val_mlm_loss", both) < 8
    assert re.search(r"Not loaded from .*pretraining/checkpoint.*\n  model\.(pooler|lm_head)", both)
    assert "embedding" not in both
    assert "Not loaded" not in from_scratch
    for printed in (both, from_scratch):
        assert 0 <= number("val_accuracy", printed) <= 1
    for phase in ("pretraining", "classifier", "from-scratch"):
        table = f"checkpoints/bert-stdlib/{phase}/metrics.csv"
        assert table in drawn()
        assert (tmp_path / table).is_file()
        assert (tmp_path / table).with_name("checkpoint").joinpath("manifest.json").is_file()


@pytest.mark.slow
def test_t5(tmp_path):
    (options,) = commands("examples/train_t5.py")
    tiny = [*TINY, "--text", str(Path(os.__file__).parent / "email"), "--vocab-size", "400", "--steps", "4"]
    printed = run("examples/train_t5.py", tmp_path, *options, *tiny)
    assert 3 < number("val_loss", printed) < 10
    corrupted, whole, restored = printed.split("\n--- ")[1:4]
    assert "<extra_id_0>" in corrupted
    assert "<extra_id_0>" not in whole
    assert whole.endswith("<|endoftext|>")
    assert restored.startswith("restored\n")
    assert (tmp_path / "checkpoints/t5-stdlib/denoising/checkpoint/manifest.json").is_file()
    assert (tmp_path / drawn()[-1]).is_file()


@pytest.mark.slow
def test_vit(tmp_path):
    first, again = commands("examples/train_vit.py")
    printed = run("examples/train_vit.py", tmp_path, *first, "--steps", "4")
    assert 0 <= number("val_accuracy", printed) <= 1
    assert re.search(r"^accuracy of predict [01]\.\d+, checkpoint in checkpoints/vit-shapes$", printed, re.MULTILINE)
    assert curves(tmp_path / "curves/vit/metrics.csv").items() >= {"val_accuracy": 4, "val_loss": 4}.items()
    continued = run("examples/train_vit.py", tmp_path, *again, "--steps", "6")
    assert number("val_accuracy", continued) <= 1
    assert (tmp_path / "checkpoints/vit-again/manifest.json").is_file()


@pytest.mark.slow
def test_mlp(tmp_path):
    (options,) = commands("examples/train_mlp.py")
    printed = run("examples/train_mlp.py", tmp_path, *options)
    assert float(re.findall(r"val_loss[^\d]+([\d.]+)", printed)[-1]) < 0.8  # a guess has 1.1


@pytest.mark.slow
def test_pictures(tmp_path):
    table = "epoch,step,train_loss,val_loss,val_accuracy\n0,0,5.5,,\n0,1,,5.0,0.5\n0,1,4.5,,\n"
    for name in drawn():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(table)
    for picture, *options in commands("docs/draw_curves.py"):
        run("docs/draw_curves.py", tmp_path, picture, *options)
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert f"]({picture.removeprefix('docs/')})" in (ROOT / "docs/examples.md").read_text()


def test_the_yaml_of_a_mixture(tmp_path, monkeypatch):
    """The check counts its experts, and the command trains it and draws their load."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    recipe = ROOT / "examples/mixture.yaml"
    given = ["--data.init_args.paths=text.txt", "--data.init_args.cache_dir=cache"]
    checked = check_run(recipe, given)
    assert checked.faults == []
    unused = 3 * (8 - 2) * 3 * 64 * 96
    assert checked.num_active == checked.num_parameters - unused
    for line in ("2 ranks: tp=1, pp=1, dp=2, ep=2", "parameters, of which a token uses"):
        assert line in str(checked)
    options = " ".join([*given, "--trainer.max_steps=40 --trainer.log_every_n_steps=40 --trainer.logger=false"])
    shell(tmp_path, f"lightning-megatron fit --config {recipe} {options} --trainer.limit_val_batches=0")
    assert (tmp_path / "experts/step-40.png").is_file()


def test_the_yaml_of_the_vision_transformer(tmp_path, monkeypatch):
    """Its commands parse and their layouts are legal; the sizes are ViT-Base/16's; a smaller one takes a step."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "examples/vit_base.yaml"
    found = re.findall(r"^# +(\d+) GPUs?: (.*)$", recipe.read_text(), re.MULTILINE)
    assert [int(gpus) for gpus, _ in found] == [1, 8, 64]
    for gpus, command in found:
        words = command.split()
        checked = check_run(recipe, words[words.index("--config") + 2 :], read_data=False)
        assert checked.faults == []
        assert checked.layout.world_size == int(gpus)
    small = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=1", "--trainer.logger=false"]
    small += [
        "--trainer.strategy.init_args.micro_batch_size=2",
        "--trainer.precision=32-true",
        "--trainer.limit_val_batches=0",
        "--trainer.callbacks=null",
    ]
    small += [f"--model.init_args.{name}" for name in ("image_size=32", "num_layers=1", "hidden_size=24")]
    small += [f"--data.init_args.{name}" for name in ("image_size=32", "batch_size=2", "train_images=4")]
    cli = MegatronCLI(run=False, args=["--config", str(recipe), "--trainer.enable_checkpointing=false", *small])
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 1
