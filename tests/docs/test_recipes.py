"""Each command of each recipe is parsed and checked, and a recipe of each family, made small, trains."""

import json
import math
import sys

import pytest
import torch
import transformers
import yaml
from jsonargparse import Namespace

from lightning_megatron import hf
from lightning_megatron.cli.training import MegatronCLI
from lightning_megatron.data.preprocess import preprocess, train_tokenizer
from lightning_megatron.hf.config_reader import Fields
from tests.support import chats
from tests.support.pages import DOCS, ROOT, blocks

sys.path.insert(0, str(DOCS))
import list_recipes  # a script of the pages

RECIPES = ROOT / "examples/recipes"
LATER = ("Mixtral-8x7B-v0.1", "Qwen3-30B-A3B", "OLMoE-1B-7B-0924", "gemma-3-1b-pt", "DeepSeek-V2-Lite")
GPU = 72  # GB of 80, for CUDA's libraries and gaps take some
SMALL = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 128,
    "kv_channels": 16, "vocab_size": None, "seq_length": 64, "decoder_seq_length": 32,
}  # fmt: skip
SMALL_PUBLISHED = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "head_dim": 16, "max_window_layers": 2, "moe_intermediate_size": 32,
    "num_local_experts": 4, "num_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def checked():
    with list_recipes.published_models():
        return [(run, run.check(GPU)) for recipe in list_recipes.RECIPES for run in list_recipes.runs(recipe)]


def test_every_command_fits(checked):
    faults = {run.command: result.faults + result.unchecked for run, result in checked if result.exit_status}
    assert not faults
    for run, result in checked:
        assert result.layout.world_size == run.gpus, run.command
        assert f"--config examples/recipes/{run.recipe.name}" in run.command
        assert result.layout.tp <= 8  # inside a machine


def test_there_are_commands_for_one_eight_and_64_gpus_or_the_smallest_number_that_fits(checked):
    gpus = {recipe.stem: {run.gpus for run, _ in checked if run.recipe == recipe} for recipe in list_recipes.RECIPES}
    assert len(gpus) >= 20
    for recipe, numbers in gpus.items():
        assert 64 in numbers, recipe
        assert 8 in numbers or min(numbers) > 8, recipe


def test_each_step_has_the_same_tokens_on_any_number_of_gpus(checked):
    for recipe in list_recipes.RECIPES:
        assert len({result.tokens for run, result in checked if run.recipe == recipe}) == 1, recipe.stem


def test_the_parameters_are_those_of_the_published_models(checked):
    for run, result in checked:
        published = list_recipes.PUBLISHED[_name(yaml.safe_load(run.recipe.read_text()))]
        assert result.num_parameters == published["parameters"], run.command
        assert f"({result.num_parameters:,} parameters)" in run.recipe.read_text()


@pytest.mark.parametrize("name", [name for name in list_recipes.PUBLISHED if name.split("/")[1] in LATER])
def test_transformers_counts_as_many_parameters(name):
    given = dict(list_recipes.PUBLISHED[name]["config"])
    config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(each.numel() for each in model.parameters()) == list_recipes.PUBLISHED[name]["parameters"]


def test_the_sizes_are_those_of_the_published_models():
    trained = {"hidden_dropout", "attention_dropout", "seq_length", "decoder_seq_length"}  # not sizes of the weights
    balanced = {"balancing", "aux_weight", "z_weight"}
    for recipe in list_recipes.RECIPES:
        run = yaml.safe_load(recipe.read_text())
        if "source" in run["model"]["init_args"]:
            continue
        given = dict(list_recipes.PUBLISHED[_name(run)]["config"])
        config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
        theirs = hf.family_of(config.model_type).read_config(Fields(config))
        ours = run["model"]["init_args"]["config"]
        for experts in (each["experts"] for each in (ours, theirs) if "experts" in each):
            for key in balanced & experts.keys():
                del experts[key]
        assert {key: ours[key] for key in ours.keys() - trained} == {
            key: theirs.get(key) for key in ours.keys() - trained
        }, recipe.stem


def test_the_page_is_up_to_date(checked):
    text = list_recipes.PAGE.read_text()
    assert list_recipes.rewritten(text, checked) == text, "run python docs/list_recipes.py"
    shown = [code.split('"')[1] for code in blocks("recipes.md", "yaml")]
    assert len(shown) == 4


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_is_added_by_a_file_of_its_own(name, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe"])
    run = _parsed("--config", RECIPES / "tiny.yaml", "--config", ROOT / f"examples/loggers/{name}.yaml")
    assert name in run.trainer.logger.class_path.lower()
    assert run.trainer.strategy.init_args.tp == 2  # the recipe's


@pytest.mark.parametrize("name", ["gpt2_124m", "llama3_8b", "pythia_160m", "bert_base", "t5_base", "olmoe_1b_7b"])
def test_a_small_one_is_pre_trained(name, tmp_path, monkeypatch):
    run = _recipe(name, tmp_path, monkeypatch)
    words = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "again"]
    sentence = "The {} {} {} {}. "
    text = "\n".join("".join(sentence.format(*(words * 3)[n + m : n + m + 4]) for m in range(8)) for n in range(8))
    (tmp_path / "text.txt").write_text(text * 3)
    train_tokenizer([tmp_path / "text.txt"], 370, tmp_path / "tokenizer.json")
    splits = "--split-sentences" in (RECIPES / f"{name}.yaml").read_text()
    preprocess(
        [tmp_path / "text.txt"], tmp_path / "data", tmp_path / "tokenizer.json", sentences=splits, progress=False
    )
    model, data = run["model"]["init_args"], run["data"]["init_args"]
    model["config"] |= {key: value for key, value in SMALL.items() if key in model["config"]}
    if "experts" in model["config"]:
        model["config"]["experts"] |= {"num": 8, "top_k": 2}
    lengths = {key: SMALL[key] for key in data["samples"]["init_args"]}
    data |= {"paths": str(tmp_path / "data"), "tokenizer": str(tmp_path / "tokenizer.json"), "global_batch_size": 4}
    data["samples"]["init_args"] = lengths
    module = _trained(run, tmp_path)
    assert module.config.hidden_size == 64


@pytest.mark.parametrize(
    "name",
    [
        "llama3_8b_lora", "llama3.1_8b_32k", "qwen2.5_7b_32k", "qwen3_0.6b", "mistral_7b", "gemma_2b", "phi4_14b",
        "gemma3_1b", "mixtral_8x7b", "qwen3_30b_a3b_lora", "deepseek_v2_lite",
    ],
)  # fmt: skip
def test_a_small_one_is_fine_tuned(name, tmp_path, monkeypatch):
    run = _recipe(name, tmp_path, monkeypatch)
    model, data = run["model"]["init_args"], run["data"]["init_args"]
    tokenizer = chats.tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    given = dict(list_recipes.PUBLISHED[model["source"]]["config"])
    given |= {key: value for key, value in SMALL_PUBLISHED.items() if key in given}
    if "kv_lora_rank" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]  # all heads have their own
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = transformers.AutoConfig.for_model(given.pop("model_type"), **given | ids | {"vocab_size": len(tokenizer)})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    rows = [{"messages": each, "prompt": "12", "answer": "345", "text": "67 " * 40} for each in chats.CHATS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model |= {"source": str(tmp_path / "model"), "config": model["config"] | {"seq_length": 64}}
    data |= {"tokenizer": str(tmp_path / "model"), "seq_length": 64, "batch_size": 4}
    data |= {"dataset": "json", "data_files": ["rows.jsonl"], "split": ["train", None, None]}
    module = _trained(run, tmp_path)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert all("_lora." in each for each in trained) == ("lora" in name)
    of_experts = [each for each in trained if ".experts.linear_fc" in each]
    assert bool(of_experts) == (name in ("mixtral_8x7b", "qwen3_30b_a3b_lora", "deepseek_v2_lite"))
    asked = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["model"]["init_args"]["config"].get("experts", {})
    assert all(getattr(module.config.experts, key) == value for key, value in asked.items())


def _name(run: dict) -> str:
    """The published model's name on the hub."""
    return run["model"]["init_args"].get("source") or run["data"]["init_args"]["tokenizer"]


def _recipe(name, tmp_path, monkeypatch):
    """A recipe for two steps of one CPU rank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["recipe"])
    run = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    run["trainer"] |= {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "max_steps": 2,
        "logger": False,
        "callbacks": [],
    }
    run["trainer"] |= {"limit_val_batches": 0, "val_check_interval": None, "enable_progress_bar": False}
    run["trainer"]["strategy"]["init_args"] |= {"tp": 1, "pp": 1, "vp": None, "cp": 1, "micro_batch_size": 2}
    run["trainer"]["strategy"]["init_args"] |= {"ep": 1, "layers_per_stage": None}
    schedule = run["model"]["init_args"]["lr_schedule"]["init_args"]
    schedule |= {key: value for key, value in (("warmup_steps", 1), ("decay_steps", 2)) if key in schedule}
    run["data"]["init_args"]["cache_dir"] = str(tmp_path / "cache")
    return run


def _trained(run, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    cli = MegatronCLI(run=False, args=["--config", str(tmp_path / "run.yaml")])
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 2
    assert math.isfinite(cli.trainer.callback_metrics["train_loss"])
    return cli.model


class _Found(Exception):
    """Holds what was parsed."""


class _Parser(MegatronCLI):
    def before_instantiate_classes(self) -> None:
        raise _Found(self.config)


def _parsed(*arguments) -> Namespace:
    with pytest.raises(_Found) as found:
        _Parser(run=False, args=[str(each) for each in arguments])
    return found.value.args[0]
