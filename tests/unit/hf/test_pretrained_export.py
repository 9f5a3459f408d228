"""A model that came from transformers goes out as transformers' own ``save_pretrained`` writes it, file by file."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lightning_megatron import AutoModule, GPTModule
from lightning_megatron.cli.main import main
from lightning_megatron.hf.pretrained_directory import in_bytes
from tests.reference import hub_models
from tests.support.small_llama import GENERATION, hub_llama


@pytest.fixture
def llama(tmp_path):
    return hub_llama(tmp_path / "llama")


MODELS = [
    "openai-community/gpt2",
    "EleutherAI/pythia-160m",
    "EleutherAI/gpt-neox-20b",
    "meta-llama/Llama-3.2-1B",
    "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-0.6B",
    "google/gemma-2b",
    "allenai/OLMo-2-1124-7B",
    "ibm-granite/granite-3.3-2b-instruct",
    "HuggingFaceTB/SmolLM3-3B",
    "zai-org/GLM-4-9B-0414",
    "bigcode/starcoder2-3b",
    "microsoft/phi-2",
    "microsoft/Phi-3-mini-4k-instruct",
    "ibm-granite/granite-3.1-1b-a400m-base",
    "unsloth/gpt-oss-20b-BF16",
    "google-bert/bert-large-uncased",
    "nlptown/bert-base-multilingual-uncased-sentiment",
    "answerdotai/ModernBERT-base",
    "google-t5/t5-small",
    "google/flan-t5-base",
]


ONE_BY_ONE = ["mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen3-30B-A3B", "allenai/OLMoE-1B-7B-0924"]


def contents(folder):
    """What each file says."""
    found = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}
    return found | {file.name: load_file(file) for file in folder.glob("*.safetensors")}


def tensors(folder):
    """All tensors, whatever file they are in."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_experts_go_out_one_by_one(name, tmp_path):
    """As transformers has them in one file; of several, its own are larger than what was asked for."""
    transformers.logging.set_verbosity_error()
    source = hub_models.write(name, tmp_path / "source")
    hub_models.architecture(name).from_pretrained(source).save_pretrained(tmp_path / "theirs")
    module = AutoModule.from_pretrained(source)
    module.save_pretrained(tmp_path / "ours")
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert_same_tensors(ours.pop("model.safetensors"), theirs.pop("model.safetensors"))
    assert ours == theirs
    module.save_pretrained(tmp_path / "parts", max_shard_size="20.5KB")
    assert max(file.stat().st_size for file in (tmp_path / "parts").glob("*.safetensors")) < 24_000
    assert_same_tensors(tensors(tmp_path / "parts"), tensors(source))


@pytest.mark.parametrize("name", MODELS)
def test_each_file_is_transformers(name, tmp_path):
    transformers.logging.set_verbosity_error()
    source = hub_models.write(name, tmp_path / "source")
    hub_models.architecture(name).from_pretrained(source).save_pretrained(tmp_path / "theirs", max_shard_size="20.5KB")
    AutoModule.from_pretrained(source).save_pretrained(tmp_path / "ours", max_shard_size="20.5KB")
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert "model-00002-of" in str(ours.keys()), "one file says nothing of the index"
    for file, content in theirs.items():
        if not file.endswith(".safetensors"):
            assert ours[file] == content
            continue
        assert_same_tensors(ours[file], content)


def test_what_is_said_of_writing_text_is_kept(llama, tmp_path):
    """Out of memory, of a checkpoint, and over the source itself."""
    module = AutoModule.from_pretrained(llama)
    module.save_pretrained(tmp_path / "out")
    main(["import", str(llama), str(tmp_path / "checkpoint")])
    main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "exported")])
    GPTModule.load_from_checkpoint(tmp_path / "checkpoint").save_pretrained(tmp_path / "loaded")
    module.save_pretrained(llama)
    for folder in ("out", "exported", "loaded", "llama"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text()) == GENERATION, folder
        weights = load_file(tmp_path / folder / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}, folder


def test_a_model_in_memory_keeps_its_own(tmp_path):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=24, n_head=3, n_layer=1, vocab_size=61))
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = [5, 6], 9
    AutoModule.from_pretrained(model).save_pretrained(tmp_path / "out")
    kept = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (kept.eos_token_id, kept.max_new_tokens) == ([5, 6], 9)


def test_a_type_that_is_asked_for_holds(llama, tmp_path):
    module = AutoModule.from_pretrained(llama)
    for asked, wanted in ((None, torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)):
        module.save_pretrained(tmp_path / "out", dtype=asked)
        assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {wanted}
        told = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
        assert told == str(wanted).removeprefix("torch.")


def test_other_files_of_a_directory_stay(llama):
    (llama / "tokenizer.json").write_text("{}")
    (llama / "model.fp16.safetensors").write_text("another's")
    AutoModule.from_pretrained(llama).save_pretrained(llama, max_shard_size="20KB")
    names = {file.name for file in llama.iterdir()}
    assert {"tokenizer.json", "model.fp16.safetensors", "model.safetensors.index.json"} <= names
    assert "model.safetensors" not in names, "transformers would read it in place of the new files"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("5GB", 5 * 10**9), ("1.5GB", 1_500_000_000), ("1.5 gb", 15 * 10**8), ("5GiB", 5 * 2**30), ("200MB", 2 * 10**8),
        ("512KiB", 2**19), ("2TB", 2 * 10**12), (1000, 1000), (1e3, 1000), ("1000", 1000), ("64B", 64),
    ],
)  # fmt: skip
def test_sizes(size, expected):
    assert in_bytes(size) == expected


@pytest.mark.parametrize("size", ["big", "5XB", "", 0, -1, "GB", "1,5GB", "0GB", None])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=r"max_shard_size=.*such as '5GB', '1.5GB', '200MB' or '5GiB'"):
        in_bytes(size)
