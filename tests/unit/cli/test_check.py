"""``check_run``: what it finds in runs that are right, that are wrong, and whose data is elsewhere."""

import json
import re
from functools import partial

import pytest
import torch
import transformers
import yaml

from lightning_megatron import GPTConfig, ParallelLayout
from lightning_megatron.cli.check.run_check import check_run
from lightning_megatron.cli.main import main
from tests.support.pages import ROOT

RECIPES = ROOT / "examples" / "recipes"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe, changed, whose text and caches are the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)

    def write(name="tiny", **changes):
        run = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        if name == "tiny":
            run["data"]["init_args"] |= {"paths": "text.txt", "cache_dir": "cache", "split": [0.8, 0.2, 0.0]}
        for path, value in changes.items():
            *above, last = path.split("__")
            place = run
            for key in above:
                place = place[key]
            place[last] = value
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        return tmp_path / "run.yaml"

    return write


def test_a_run_that_is_right(recipe):
    result = check_run(recipe())
    assert (result.exit_status, result.faults, result.unchecked) == (0, [], [])
    assert result.layout == ParallelLayout(world_size=4, tp=2, pp=2)
    assert (result.rows, result.global_batch, result.micro_batches, result.tokens) == (16, 16, (2,) * 8, 16 * 64)
    train, val = result.loaders
    assert (train.name, train.batches, train.last_rows) == ("train", 4, 8)
    assert train.tensors == {"text": "[16, 65] int64"}
    assert "brown fox jumps over" in train.texts["text"]
    assert val.rows == 14
    config = GPTConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=257, seq_length=64)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    settings = {"precision": "32-true", "device": "cpu", "optimizer": optimizer}
    assert result.memory == result.layout.memory(config, micro_batch_size=2, num_microbatches=8, **settings)
    layer = 12 * 64**2 + 13 * 64
    assert result.num_parameters == 2 * layer + 257 * 64 + 64 * 64 + 128
    assert json.loads(json.dumps(result.as_dict()))["layout"]["dp"] == 1
    for line in ("4 ranks: tp=2, pp=2, dp=1", "8 of 2 rows", "the last one has 8 rows", "Nothing is wrong."):
        assert line in str(result)


def test_a_run_of_64_gpus_whose_data_is_elsewhere(recipe):
    path = recipe("llama3_70b")
    result = check_run(path, gpu_memory=80)
    assert result.exit_status == 2
    assert [line.split()[-3] for line in str(result).splitlines() if "GB at most" in line] == ["and"]
    assert result.num_parameters == pytest.approx(70.55e9, rel=0.001)
    assert (result.layout.dp, result.rows, len(result.micro_batches)) == (2, 256, 256)
    assert any("data/llama3_70b.bin" in line for line in result.unchecked)
    small = check_run(path, gpu_memory=20, read_data=False)
    assert small.exit_status == 1
    assert "a GPU has 20 GB" in small.faults[0]


def test_faults_of_all_parts_are_listed(recipe):
    path = recipe(
        trainer__strategy__init_args={"tp": 2, "pp": 2, "micro_batch_size": 3},
        trainer__gradient_clip_val=1.0,
        model__init_args__config={"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 50},
    )
    result = check_run(path)
    assert result.exit_status == 1
    for part in ("num_layers", "batch_size=16 is not a multiple of micro_batch_size=3", "ids 0 to 49"):
        assert any(part in fault for fault in result.faults), (part, result.faults)


def test_arguments_that_do_not_exist_are_listed_from_all_sections(recipe):
    path = recipe(trainer__max_stepz=3, data__init_args__batchsize=4, model__init_args__config__hiden_size=3)
    faults = check_run(path).faults
    for name in ("max_stepz", "batchsize", "hiden_size"):
        assert sum(name in fault for fault in faults) == 1, faults


@pytest.mark.parametrize(("more", "status"), [([], 0), (["--gpu-memory", "0.00001"], 1), (["--no-data", "--json"], 0)])
def test_the_command(more, status, recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", str(recipe()), "--trainer.max_steps", "3", *more])
    assert ended.value.code == status
    told = capsys.readouterr().out
    assert json.loads(told)["global_batch"] == 16 if "--json" in more else "16 rows, 1,024 tokens a step" in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trainer.strategy.tp", "3"], "do not divide the world of 4"),
        (["--trainer.devices", "none"], r"Trainer\(devices='none'\)"),
        (["--trainer.strategy.tpp", "3"], "did you mean --trainer.strategy.tp"),
        (["--data.batch_size", "0"], "batch_size"),
        (["--trainer.strategy.process_group_backend", "nccl"], "process_group_backend='nccl'"),
        (["--trainer.accelerator", "tpu"], "Use 'cpu' or 'gpu'"),
        (["--trainer.accumulate_grad_batches", "0"], r"accumulate_grad_batches=0\): use a whole number from 1"),
        (["--trainer.gradient_clip_val", "-1"], r"gradient_clip_val=-1\): use a number from 0"),
        (["--trainer.val_check_interval", "0"], r"Trainer\(val_check_interval=0\): use a number of batches from 1"),
        (
            ["--model.config.experts.num", "4", "--model.config.experts.top_k", "9"],
            r"^Experts\(num=4, top_k=9\):",
        ),
        (["--model.lora.rank", "0"], r"^LoRA\(rank=0\): use a whole number from 1."),
        (["--model.optimizer.lrr", "1"], "no argument --model.optimizer.lrr; did you mean --model.optimizer.lr"),
        (["--model.optimizer.weight_decay", "x"], "^--model.optimizer.weight_decay=x: use a number"),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_epochs", "x"],
            "every_n_epochs=x: use a whole",
        ),
        (["--model.optimizer.lr", "high"], "^--model.optimizer.lr=high: use a number"),
        (["--model.lr_schedule.warmup_steps=-3"], "^warmup_steps=-3 is not a whole number|LRSchedule.*warmup_steps=-3"),
    ],
    ids=str,
)
def test_a_fault(arguments, says, recipe):
    result = check_run(recipe(), arguments)
    assert result.exit_status == 1
    assert any(re.search(says, fault) for fault in result.faults), result.faults


def test_what_waits_for_a_trainer_is_said(recipe):
    for arguments in (["--trainer.strategy.tp", "3"], ["--trainer.devices", "0"]):
        result = check_run(recipe(), arguments)
        assert len(result.faults) == 1, result.faults
        assert result.unchecked[0].startswith("Batches, data and memory: they are checked once a Trainer")


PLAIN = """
import lightning.pytorch as pl
import torch

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1000, 1000, bias=False)
"""


def test_the_memory_of_a_module_of_no_family(recipe, tmp_path, monkeypatch):
    (tmp_path / "plain_net.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = {"model": {"class_path": "plain_net.Net"}, "data": None, "trainer__devices": 2}
    for precision, size in (("bf16-mixed", 12), ("bf16-true", 10)):  # 4 + 4 + 8 / 2 bytes, and 2 + 2 + 12 / 2
        result = check_run(recipe(**run, trainer__strategy__init_args={}, trainer__precision=precision))
        assert result.exit_status == 0
        assert result.states.startswith(f"{size}.00 MB on each rank: weights, gradients and the state of AdamW;")
    assert check_run(tmp_path / "run.yaml", gpu_memory=80).exit_status == 2
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    own = check_run(ROOT / "examples/vit_base.yaml", read_data=False)
    assert own.states.startswith("not known before the run, in which ViTModule makes its layers.")


def test_a_module_that_python_does_not_find(recipe):
    (fault,) = check_run(recipe(model={"class_path": "my_modles.Net"}), read_data=False).faults
    assert fault.startswith("--model=my_modles.Net: Python finds no module my_modles; check its name")


def test_a_model_on_the_hub_is_described_by_its_configuration(recipe, tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "models--someone--llama"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=512)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "snapshots" / "1")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1")
    path = recipe("llama3_8b_lora", model__init_args__source="someone/llama")
    result = check_run(path, read_data=False)
    assert result.exit_status == 0, result
    assert result.memory.largest.gradients < result.memory.largest.weights  # of updates alone
    assert result.num_parameters == sum(p.numel() for p in transformers.LlamaForCausalLM(config).parameters())
    assert result.memory is not None
    assert "; LoRA trains " in str(result)


def test_the_rank_grid_has_the_memory_of_a_model(tmp_path, capsys):
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=512, max_position_embeddings=128)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    main(["show", "tp=2,pp=2,world=4", "--model", str(tmp_path), "--micro-batch-size", "2", "--seq-length", "64"])
    ours = GPTConfig(
        num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, vocab_size=512, seq_length=128,
        position_embedding="rope", normalization="RMSNorm", activation="swiglu", bias=False, tie_embeddings=False,
    )  # fmt: skip
    table = ParallelLayout(world_size=4, tp=2, pp=2).memory(ours, micro_batch_size=2, lengths=(64,))
    assert capsys.readouterr().out.endswith(f"\n{table}\n")
    main(["show", "pp=2", "--layers-per-stage", "3,1", "--model", str(tmp_path), "--precision", "32-true"])
    table = ParallelLayout(world_size=2, pp=2, layers_per_stage=[3, 1]).memory(ours, precision="32-true")
    told = capsys.readouterr().out
    assert told.startswith("2 ranks on 1 node of 2: tp=1, pp=2, dp=1, layers_per_stage=[3, 1]\n")
    assert "stage 0 (3 layers)" in told
    assert "stage 1 (1 layer)" in told
    assert told.endswith(f"\n{table}\n")
    main(["show", "pp=2,vp=2", "--layers-per-stage", "Et|t|t|tL"])
    assert "stages 1, 3 (1 + 1 layers)" in capsys.readouterr().out
    main(["show", "pp=2", "--layers-per-stage", "auto", "--model", str(tmp_path)])
    assert "layers_per_stage=[2, 2]" in capsys.readouterr().out
    config.vocab_size = 704  # an output layer that takes longer than a layer of short rows
    config.save_pretrained(tmp_path)
    for length, cut in (("128", "[2, 2]"), ("16", "[3, 1]")):
        main(["show", "pp=2", "--layers-per-stage", "auto", "--model", str(tmp_path), "--seq-length", length])
        assert f"layers_per_stage={cut}" in capsys.readouterr().out
