"""Each recipe is parsed by the command's own parser, and its sizes fit its layout and its data."""

import json
from pathlib import Path

import pytest
import transformers
import yaml
from jsonargparse import Namespace

from lightning_megatron import BertConfig, GPTConfig, LoRA, ParallelLayout, T5Config
from lightning_megatron.cli.rank_grid import RankGrid
from lightning_megatron.cli.training import MegatronCLI
from tests.reference import pretrained
from tests.support.pages import ROOT, blocks

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
VOCAB_SIZE = 50257  # where it is the tokenizer's


class _Parsed(Exception):
    """Holds what was parsed."""


class _Parser(MegatronCLI):
    def before_instantiate_classes(self) -> None:
        raise _Parsed(self.config)


def parsed(recipe: Path) -> Namespace:
    with pytest.raises(_Parsed) as found:
        _Parser(run=False, args=["--config", str(recipe)])
    return found.value.args[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits(recipe, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe"])
    run = parsed(recipe)
    strategy = dict(run.trainer.strategy.init_args)
    names = ("tp", "pp", "vp", "cp", "ep", "etp", "sequence_parallel", "pipeline_split_rank")
    world = run.trainer.devices * run.trainer.num_nodes
    layout = ParallelLayout(world_size=world, **{name: strategy[name] for name in names})
    assert not list(RankGrid(layout, run.trainer.devices).warnings())
    data, model = run.data.init_args, run.model.init_args
    samples = data.samples.init_args if "samples" in data else data
    if "source" in model:  # its sizes are the pretrained model's
        assert isinstance(LoRA(**dict(model.lora)), LoRA)
        assert model.config["seq_length"] >= samples.seq_length
    else:
        kind = {"GPTModule": GPTConfig, "BertModule": BertConfig, "T5Module": T5Config}[
            run.model.class_path.rpartition(".")[2]
        ]
        sizes = {key: value for key, value in dict(model.config).items() if value is not None}
        config = kind(**{"vocab_size": VOCAB_SIZE, "seq_length": samples.seq_length, **sizes})
        config.check(layout)
        assert config.seq_length >= samples.seq_length
    batch = data.batch_size if "batch_size" in data and data.batch_size else data.global_batch_size // layout.dp
    if strategy["micro_batch_size"]:
        layout.check_batch(batch, strategy["micro_batch_size"])


def test_there_are_those_that_are_promised():
    assert {path.stem for path in RECIPES} == {"tiny", "gpt_1b", "llama_8b_lora", "bert", "t5", "gpt_70b"}


def test_a_pretrained_model_is_fine_tuned_from_yaml(tmp_path, monkeypatch):
    """The 8B recipe on a small model and text."""
    monkeypatch.setattr("sys.argv", ["recipe"])
    monkeypatch.chdir(tmp_path)
    config = {**pretrained._GROUPED, "vocab_size": 257}  # bytes
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(tmp_path / "model")
    rows = [{"prompt": "12", "answer": "345"}, {"prompt": "a", "answer": "bc"}] * 4
    (tmp_path / "instructions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = yaml.safe_load((Path(RECIPES[0]).parent / "llama_8b_lora.yaml").read_text())
    run["trainer"] = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False}
    run["model"]["init_args"] |= {"source": str(tmp_path / "model"), "config": {"seq_length": 64}}
    run["data"]["init_args"] |= {"tokenizer": "bytes", "seq_length": 64, "batch_size": 4, "cache_dir": str(tmp_path)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    cli = MegatronCLI(run=False, args=["--config", str(tmp_path / "run.yaml")])
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 4
    assert cli.model.lora.rank == 16
    trained = [name for name, p in cli.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("_lora." in name for name in trained)


def test_the_page_shows_each():
    shown = {RECIPES[0].parents[2] / code.split('"')[1] for code in blocks("recipes.md", "yaml")}
    assert shown == set(RECIPES)
