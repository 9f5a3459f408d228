"""The command, in processes of its own: a run from YAML, resumed and predicting; and what it says of mistakes."""

import multiprocessing
import os
import re
import sys

import pytest
import torch
import yaml

from lightning_megatron.distributed import rank_server
from tests.support.pages import COMMAND, ROOT, blocks, run
from tests.support.ranks import PRELOADED

RECIPES = ROOT / "examples" / "recipes"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PRELOADED, "lightning_megatron.cli.training"])


def command(folder, *arguments):
    return run(folder, *COMMAND, *map(str, arguments))


def refused(folder, *arguments):
    """The first line that the command says in a process of its own, which ends with an error."""
    process = _context.Process(target=_main, args=(folder, list(map(str, arguments))))
    process.start()
    process.join(60)
    assert process.exitcode not in (0, None), (folder / "stderr").read_text()
    lines = (folder / "stderr").read_text().splitlines()
    assert not any(line.startswith("Traceback") for line in lines), lines[-5:]
    return next(line for line in lines if line.startswith(("error:", "lightning-megatron:")))


def _main(folder, arguments):
    os.chdir(folder)
    os.environ |= {"LITLOGGER_DISABLED": "1", rank_server.OFF: "0"}
    with (folder / "stderr").open("w") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    sys.argv = ["lightning-megatron", *arguments]
    from lightning_megatron.cli.main import main

    main()


@pytest.fixture
def run_yaml(tmp_path):
    """A run of two processes."""
    recipe = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
    recipe["trainer"] |= {"devices": 4, "max_steps": 4, "logger": False, "log_every_n_steps": 1}
    recipe["trainer"]["callbacks"] = [
        {
            "class_path": "ModelCheckpoint",
            "init_args": {"dirpath": "kept", "save_last": True, "every_n_train_steps": 2, "save_top_k": -1},
        }
    ]
    recipe["data"]["init_args"] |= {"cache_dir": str(tmp_path / "cache"), "paths": [str(ROOT / "lightning_megatron")]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "run.yaml"


def test_fit_resume_and_predict(run_yaml, tmp_path):
    command(tmp_path, "fit", "--config", run_yaml)
    assert {path.name for path in (tmp_path / "kept").iterdir()} >= {"last.ckpt", "epoch=0-step=2.ckpt"}
    command(tmp_path, "fit", "--config", run_yaml, "--ckpt_path", "kept/last.ckpt", "--trainer.max_steps", 6)
    assert (tmp_path / "kept" / "epoch=0-step=6.ckpt").is_dir()
    told = command(tmp_path, "validate", "--config", run_yaml, "--ckpt_path", "kept/last.ckpt")
    assert re.search(r"val_loss\s+│\s+[45]\.\d+", told)
    out = command(tmp_path, "predict", "--config", run_yaml, "--ckpt_path", "kept/last.ckpt")
    assert "Predicting" in out


def test_what_is_printed_can_be_read_again(run_yaml, tmp_path):
    once = command(tmp_path, "fit", "--config", run_yaml, "--print_config")
    (tmp_path / "printed.yaml").write_text(once)
    assert command(tmp_path, "fit", "--config", tmp_path / "printed.yaml", "--print_config") == once
    assert yaml.safe_load(once)["trainer"]["strategy"]["init_args"]["tp"] == 2


def test_help_describes_every_argument(tmp_path):
    for name, cls in (("trainer.strategy", "MegatronStrategy"), ("model", "GPTModule"), ("data", "TextDataModule")):
        told = command(tmp_path, "fit", f"--{name}.help", cls)
        undescribed = re.findall(rf"^  --({name}[.\w]+) \S+\n(?=  --|\n|\Z)", told, re.M)
        assert not undescribed, undescribed
        assert told.count(f"--{name}.") > 10


# What is wrong and what to do, in the first line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fitt"], "there is no command fitt; did you mean fit?"),
        (["fit", "--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file; did you mean run.yaml?"),
        (["fit"], "--model is required; give it here or in a --config file"),
        (["preprocess", "texts.jsonl"], "[^-]--out is required"),
        (["--trainer.strateg.tp", "4"], "no argument --trainer.strateg; did you mean --trainer.strategy?"),
        (["--trainer.strategy.tpp", "4"], "no argument --trainer.strategy.tpp; did you mean --trainer.strategy.tp?"),
        (["--trainer.strategy.seq_parallel", "true"], "did you mean --trainer.strategy.sequence_parallel?"),
        (["--trainer.max_stepz", "4"], "no argument --trainer.max_stepz; did you mean --trainer.max_steps?"),
        (["--trainer.max_steps", "many"], "--trainer.max_steps=many: use a whole number"),
        (["--trainer.strategy.tp", "two"], "--trainer.strategy.tp=two: use a whole number"),
        (["--trainer.strategy.recompute", "half"], "--trainer.strategy.recompute=half: use 'selective' or 'full'"),
        (["--trainer.strategy.timeout", "soon"], r"--trainer.strategy.timeout: use .*h:m:s.* but got .soon"),
        (["--trainer.strategy.on_nonfinite", "skp"], "on_nonfinite=skp is unknown; did you mean skip?"),
        (["--trainer.precision", "bf17"], "--trainer.precision=bf17: use .*'bf16-mixed'"),
        (["--trainer.callbacks", "ModelChekpoint"], "no such class; did you mean ModelCheckpoint?"),
        (["--trainer.logger", "TensorBoardLoger"], "no such class; did you mean TensorBoardLogger?"),
        (["--model", "GPTModul"], "--model=GPTModul: there is no such class; did you mean GPTModule?"),
        (["--data", "TextDataModul"], "--data=TextDataModul: there is no such class; did you mean TextDataModule?"),
        (["--model.config.hiden_size", "3"], "no argument --model.config.hiden_size; did you mean .*hidden_size?"),
        (["--model.config.hidden", "3"], "did you mean --model.config.hidden_size or --model.config.hidden_dropout?"),
        (["--model.config.hidden_size", "big"], "--model.config.hidden_size=big: use a whole number"),
        (["--model.config.activation", "gelu2"], "--model.config.activation=gelu2 is unknown; did you mean gelu?"),
        (
            ["--model.config.experts", "4"],
            "--model.config.experts is 4; it takes arguments of Experts: num, .* Write --model.config.experts.num=",
        ),
        (["--model.config.experts.top_k", "2"], "--model.config.experts.num is required"),
        (["--model.optimizer", "AdamWW"], "no such class; did you mean AdamW?"),
        (["--model.lr_schedule.style", "cosin"], "--model.lr_schedule.style=cosin is unknown; did you mean cosine?"),
        (["--model.optimizer", "4"], "--model.optimizer=4: use the name of an optimizer, such as AdamW"),
        (
            ["--model.lr_schedule", "4"],
            "--model.lr_schedule is 4; it takes arguments of LRSchedule: style, .* and more",
        ),
        (["--model.loss_reduction", "tokn"], "--model.loss_reduction=tokn is unknown; did you mean token?"),
        (["--data.batchsize", "3"], "no argument --data.batchsize; did you mean --data.batch_size?"),
        (["--data.batch_size", "many"], "--data.batch_size=many: use a whole number"),
        (["--seed_everything", "x"], "--seed_everything=x: use true or false or a whole number"),
        (["--trainer.strategy.tp", "3"], r"tp=3, pp=2\): 3 × 2 = 6 ranks do not divide the world of 4. Use tp=2"),
        (["--trainer.strategy.cp", "3"], r"tp=2, pp=2, cp=3\): 2 × 2 × 3 = 12 ranks do not divide the world of 4. Use"),
        (["--trainer.strategy.cp_comm", "p2p"], "cp_comm=p2p is unknown; did you mean ring?"),
        (["--trainer.strategy.ep", "2"], "do not divide the 2 ranks of a pipeline stage. Use ep=1"),
        (["--trainer.devices", "none"], "--trainer.devices=none: use a number from 1"),
        (["--trainer.precision", "fp8"], "--trainer.precision=fp8 is unknown; did you mean transformer-engine?"),
        (
            ["--trainer.accelerator", "gpu"],
            "accelerator=gpu: torch finds no GPU on this machine. Use cpu",
        ),
        (["--trainer.precision", "64-true"], "precision.*64"),
        (["--model.config.num_attention_heads", "5"], "the model does not fit"),
        (["show", "tp=3,world=16"], "tp=3.* ranks do not divide the world of 16. Use tp=2 or tp=4"),
        (["export", "nowhere", "out.safetensors"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_first_line_names_the_argument_and_the_remedy(arguments, says, run_yaml, tmp_path):
    if arguments[0].startswith("--"):
        arguments = ["fit", "--config", run_yaml, *arguments]
    says = says.removesuffix("?") + (r"\?" if says.endswith("?") else "")
    assert re.search(says, refused(tmp_path, *arguments))


def test_the_rank_grid(tmp_path):
    told = command(tmp_path, "show", "tp=16,pp=2,world=32", "--out", "grid.png")
    assert "stage 1  16 17 18" in told
    assert "Warning: tensor parallelism crosses nodes" in told
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert "Warning" not in command(tmp_path, "show", "tp=8,pp=2,world=32")


def test_training_in_this_process_is_the_same(run_yaml, tmp_path, monkeypatch):
    """``MegatronCLI`` in a script of one's own, whose module leaves its sizes to the data."""
    monkeypatch.chdir(tmp_path)
    from lightning_megatron import GPTModule
    from lightning_megatron.cli.training import MegatronCLI

    arguments = ["--config", str(run_yaml), "--trainer.devices", "1", "--trainer.strategy", "megatron"]
    monkeypatch.setattr(sys, "argv", ["script.py"])
    cli = MegatronCLI(run=False, args=arguments)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert isinstance(cli.model, GPTModule)
    assert (cli.model.config.vocab_size, cli.model.config.seq_length) == (cli.datamodule.vocab_size, 64)
    assert isinstance(cli.trainer.optimizers[0].param_groups[0]["lr"], float)
    assert cli.trainer.global_step == 4
    assert torch.isfinite(cli.trainer.callback_metrics["train_loss"])


def test_the_commands_of_the_page(tmp_path):
    block, check = blocks("cli.md", "bash")
    lines = [line.partition("#")[0].split()[1:] for line in block.splitlines()]
    assert [line[0] for line in lines] == ["fit", "fit", "show"]
    command(
        ROOT, *lines[1], "--trainer.max_steps", "1", "--trainer.logger", "false", "--trainer.default_root_dir", tmp_path
    )
    assert "stage 1  2 3" in command(tmp_path, *lines[2])
    assert command(ROOT, *check.split()[1:]) in (ROOT / "docs/cli.md").read_text()


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path):
    code = "import sys; from lightning_megatron.cli.main import main; sys.modules['matplotlib'] = None; "
    with pytest.raises(AssertionError, match=r"needs matplotlib.*pip install 'lightning-megatron\[plots\]'"):
        run(tmp_path, sys.executable, "-c", code + "main(['show', 'tp=2,world=2', '--out', 'grid.png'])")
