"""Where pretrained models come from, what is refused, and the directories and checkpoints that are made of them."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightning_megatron import AutoModule, BertModule, GPTConfig, GPTModule, T5Module
from lightning_megatron.cli.main import main
from lightning_megatron.hf import UnsupportedConfigError, WeightsError
from tests.reference import pretrained
from tests.support.layout import Layout
from tests.support.small_llama import batches, saved_llama
from tests.support.trainer import trainer


@pytest.fixture
def llama(tmp_path):
    return saved_llama(tmp_path / "llama")


def logits(module):
    with torch.no_grad():
        return module.eval()(input_ids=pretrained.samples("llama")[0]["input_ids"][None])


def expected():
    with torch.no_grad():
        return pretrained.new_model("llama")(pretrained.samples("llama")[0]["input_ids"][None]).logits


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


# Where they come from


def test_one_file_several_files_and_pickled_ones(llama, tmp_path):
    model = pretrained.new_model("llama")
    model.save_pretrained(tmp_path / "several", max_shard_size="50KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    pickled = tmp_path / "pickled"
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    for folder in (llama, tmp_path / "several", pickled):
        torch.testing.assert_close(logits(GPTModule.from_pretrained(folder)), expected(), rtol=0, atol=1e-5)


def test_files_of_a_model_without_a_head(tmp_path):
    model = pretrained.new_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "base")
    assert not any(name.startswith("transformer.") for name in load_file(tmp_path / "base" / "model.safetensors"))
    ids = pretrained.samples("gpt2")[0]["input_ids"][None]
    with torch.no_grad():
        seen, wanted = AutoModule.from_pretrained(tmp_path / "base").eval()(input_ids=ids), model(ids).logits
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-5)


def test_bfloat16_weights_go_out_as_they_came_in(llama, tmp_path):
    pretrained.MODELS["llama"]().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    before = load_file(tmp_path / "half" / "model.safetensors")
    GPTModule.from_pretrained(tmp_path / "half").save_pretrained(tmp_path / "out", dtype="bfloat16")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: t.dtype for name, t in after.items()} == dict.fromkeys(before, torch.bfloat16)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_new_head_starts_anew_and_the_rest_is_loaded(tmp_path):
    pretrained.new_model("bert-masked").save_pretrained(tmp_path / "masked")
    with pytest.warns(UserWarning, match=r"new head.*\n.*classifier"):
        module = BertModule.from_pretrained(
            tmp_path / "masked", config={"task": "sequence_classification", "num_labels": 7}
        )
    assert module.build()(input_ids=torch.ones(2, 9, dtype=torch.long)).shape == (2, 7)
    stored = pretrained.new_model("bert-masked").bert.embeddings.word_embeddings.weight
    embedding = module.chunks[0].embedding.word_embeddings.weight
    assert torch.equal(embedding[: pretrained.VOCAB], stored)


def test_positions_of_a_roberta_leave_padding_out():
    model, module = (
        pretrained.new_model("roberta-masked"),
        BertModule.from_pretrained(pretrained.new_model("roberta-masked")),
    )
    ids = pretrained.samples("roberta-masked")[0]["input_ids"][None].repeat(3, 1)
    ids[1, :5] = ids[2, 20:] = ids[0, 7] = pretrained._ROBERTA["pad_token_id"]
    with torch.no_grad():
        seen, wanted = module.eval()(input_ids=ids, attention_mask=ids != 0), model(ids, attention_mask=ids != 0).logits
    torch.testing.assert_close(seen[ids != 0], wanted[ids != 0], rtol=0, atol=1e-5)


def test_positions_of_a_roberta_begin_anew_in_each_text_of_a_row():
    module = BertModule.from_pretrained(pretrained.new_model("roberta-tokens")).build()
    batch = {"input_ids": torch.tensor([[5, 6, 0, 7, 8, 9, 0]]), "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1]])}
    assert module.get_batch(batch)["position_ids"].tolist() == [[1, 2, 0, 1, 2, 3, 0]]


@pytest.mark.parametrize(("name", "share"), [("roberta-sequences", 0.5), ("bert-sequences", 0.0)])
def test_dropout_before_the_first_layer_of_a_head_is_robertas(name, share):
    module = BertModule.from_pretrained(pretrained.new_model(name), config={"hidden_dropout": 0.5}).build().train()
    seen = []
    module.chunks[0].pooler.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    module(input_ids=torch.full((20, 9), 7))
    assert float((seen[0] == 0).float().mean()) == pytest.approx(share, abs=0.05)


# What is made of them


def test_import_and_export_on_the_command_line(llama, tmp_path, capsys):
    main(["import", str(llama), str(tmp_path / "checkpoint")])
    torch.testing.assert_close(
        logits(GPTModule.load_from_checkpoint(tmp_path / "checkpoint")), expected(), rtol=0, atol=1e-5
    )
    main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--max-shard-size", "60KB"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in pretrained.new_model("llama").state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    with pytest.raises(SystemExit, match="exists already"):
        main(["import", str(llama), str(tmp_path / "checkpoint")])


def test_after_a_run_of_other_processes(llama, tmp_path):
    """The ranks are gone; what they left is written."""
    module = GPTModule.from_pretrained(llama)
    run = trainer(Layout(tp=2), strategy={"launch": "forkserver"}, max_steps=1)
    run.fit(module, batches({"input_ids": torch.ones(2, 9, dtype=torch.long)}))
    module.save_pretrained(tmp_path / "out")
    after, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(llama / "model.safetensors")
    assert after.keys() == before.keys()
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_a_model_that_came_from_nowhere_finds_its_family(tmp_path):
    config = GPTConfig(
        num_layers=1, hidden_size=24, num_attention_heads=6, num_query_groups=2, vocab_size=50, seq_length=16,
        position_embedding="rope", normalization="RMSNorm", activation="swiglu", bias=False, qkv_bias=True,
    )  # fmt: skip
    module = GPTModule(config)
    module.save_pretrained(tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert back.config.model_type == "qwen2"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(input_ids=ids), back(ids).logits, rtol=0, atol=1e-5)


def test_a_model_trained_on_shorter_texts_keeps_its_length(llama, tmp_path):
    module = GPTModule.from_pretrained(llama, config={"seq_length": 16})
    module.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 64


def test_a_second_save_replaces_the_first(llama, tmp_path):
    module = GPTModule.from_pretrained(llama)
    module.save_pretrained(tmp_path / "out", max_shard_size="50KB")
    module.save_pretrained(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["llama", "out"]


def test_a_failed_save_leaves_nothing(llama, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    module = GPTModule.from_pretrained(llama)
    with pytest.raises(RuntimeError, match=r"out was not saved.*No space left"):
        module.save_pretrained(tmp_path / "out", tokenizer=Tokenizer())
    assert [file.name for file in tmp_path.iterdir()] == ["llama"]


# What is refused, before a weight is read


def test_an_unknown_architecture_names_those_there_are(llama):
    edit(llama, model_type="opt", architectures=["OPTForCausalLM"])
    with pytest.raises(UnsupportedConfigError, match=r"'opt' is not.*bert, .*gemma, .*glm4, gpt2.*docs/hf.md"):
        AutoModule.from_pretrained(llama)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("mamba", "layers with a state"),
        ("qwen2_5_vl", "reads pictures"),
        ("vit", "reads pictures"),
        ("whisper", "hears sounds"),
        ("electra", "embeddings may be narrower.*Encoders for the same tasks are 'bert'"),
    ],
)
def test_an_architecture_of_another_kind_says_so(model_type, says, llama):
    edit(llama, model_type=model_type)
    with pytest.raises(UnsupportedConfigError, match=f"'{model_type}' is not among.*{says}"):
        AutoModule.from_pretrained(llama)


def test_code_in_the_directory_is_not_run(llama):
    edit(llama, model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"})
    with pytest.raises(ValueError, match="'mine' is not transformers' own; its code is in the model's directory"):
        AutoModule.from_pretrained(llama)


def test_another_adapters_model(llama):
    with pytest.raises(UnsupportedConfigError, match=r"is a llama, which becomes a GPTModule"):
        T5Module.from_pretrained(llama)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_without_a_counterpart_is_named(llama, fields, named):
    edit(llama, **fields)
    with pytest.raises(UnsupportedConfigError, match=re.escape(named)):
        AutoModule.from_pretrained(llama)


def test_a_field_that_changes_nothing_can_be_ignored(llama):
    edit(llama, is_causal=False)
    with pytest.raises(UnsupportedConfigError, match=r"ignore=\['is_causal'\]"):
        AutoModule.from_pretrained(llama)
    AutoModule.from_pretrained(llama, ignore=["is_causal"])


def test_missing_and_extra_tensors(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.surprise"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"nothing was loaded") as error:
        AutoModule.from_pretrained(llama)
    assert "model.layers.1.mlp.surprise belongs to no part of the model" in str(error.value)
    assert "model.layers.1.mlp.up_proj.weight is missing" in str(error.value)


def test_damaged_and_missing_files(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory here"):
        AutoModule.from_pretrained(tmp_path / "nowhere")
    content = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read.*It is damaged"):
        AutoModule.from_pretrained(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no weights.*config.json"):
        AutoModule.from_pretrained(llama)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"names model-00001-of-00002.safetensors, which"):
        AutoModule.from_pretrained(llama)


def test_damaged_files_are_named(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    (pickled := tmp_path / "pickled").mkdir()
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    whole = (pickled / "pytorch_model.bin").read_bytes()
    (pickled / "pytorch_model.bin").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read.*It is damaged"):
        AutoModule.from_pretrained(pickled)
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json cannot be read.*weight_map"):
        AutoModule.from_pretrained(llama)


def test_a_field_that_there_is_not_is_named(llama):
    with pytest.raises(ValueError, match=r"GPTConfig has no argument 'hidden_dropot': did you mean hidden_dropout\?"):
        AutoModule.from_pretrained(llama, config={"hidden_dropot": 0.1})


@pytest.mark.parametrize("name", ["roberta-masked", "modernbert-masked"])
def test_a_head_of_another_family_is_named(name):
    family = name.removesuffix("-masked")
    with pytest.raises(
        UnsupportedConfigError, match=f"'task': 'pretraining'.*{family} has no such head.*masked_lm, seq"
    ):
        AutoModule.from_pretrained(pretrained.new_model(name), config={"task": "pretraining"})


def test_a_file_is_no_directory(llama, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(RuntimeError, match=r"out was not saved.*is a file; name a directory"):
        AutoModule.from_pretrained(llama).save_pretrained(tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["llama", "out"]


def test_a_model_in_memory_keeps_its_head():
    """Its configuration does not say which head it has; its class does."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=16, num_labels=5)
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.arange(20).view(2, 10)
    module = AutoModule.from_pretrained(model).eval()
    assert module.config.task == "sequence_classification"
    torch.testing.assert_close(module(input_ids=ids), model(ids).logits, rtol=0, atol=1e-5)
    assert model.config.architectures is None  # the user's own is left as it is


def test_what_cannot_go_out_is_named(llama):
    module = GPTModule.from_pretrained(llama)
    with pytest.raises(UnsupportedConfigError, match=r"position_embedding='rope'\) cannot be saved as a gpt2"):
        module.save_pretrained("out", family="gpt2")
    with pytest.raises(UnsupportedConfigError, match="A GPT cannot be saved as a bert"):
        module.save_pretrained("out", family="bert")
    with pytest.raises(ValueError, match="use 'float32', 'bfloat16'"):
        module.save_pretrained("out", dtype="int8")
    with pytest.raises(ValueError, match="max_shard_size='big'"):
        module.save_pretrained("out", max_shard_size="big")
    with pytest.raises(TypeError, match="has no save_pretrained"):
        module.save_pretrained("out", tokenizer=3)
