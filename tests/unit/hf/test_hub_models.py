"""Models as the Hugging Face hub has them: each gives transformers' logits, or is refused by name.

Logits agree to 1e-4 in fp32, where they are of the order of 1 to 5: sums are taken in another order.
"""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightning_megatron import AutoModule
from lightning_megatron.cli.main import main
from lightning_megatron.hf import UnsupportedConfigError, WeightsError
from tests.reference import hub_models, pretrained


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def inputs(model):
    ids = torch.arange(20).view(2, 10) % hub_models.VOCAB
    sides = {"decoder_input_ids": ids.flip(1)[:, :7]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **sides}


def assert_same_logits(folder, architecture, **arguments):
    theirs = architecture.from_pretrained(folder, dtype=torch.float32).eval()
    ours = AutoModule.from_pretrained(folder, **arguments).eval()
    with torch.no_grad():
        seen, wanted = ours(**inputs(theirs)), theirs(**inputs(theirs))
    for one, other in zip(seen if isinstance(seen, tuple) else [seen], pretrained.logits_in(wanted), strict=True):
        assert float(other.std()) > 0.05, "too small to tell models apart"
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*has no weights for a new head")
@pytest.mark.parametrize("name", hub_models.CONFIGS)
def test_a_model_of_the_hub_is_transformers(name, tmp_path):
    folder = hub_models.write(name, tmp_path / "model")
    assert_same_logits(folder, hub_models.architecture(name))


def test_a_file_of_an_old_torch(tmp_path):
    folder = hub_models.write("microsoft/DialoGPT-medium", tmp_path / "model")
    file = folder / "pytorch_model.bin"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert_same_logits(folder, transformers.GPT2LMHeadModel)


REFUSED = {
    "openai-community/gpt2": [{"scale_attn_by_inverse_layer_idx": True}, {"is_causal": False}],
    "EleutherAI/pythia-160m": [{"head_dim": 8}, {"hidden_act": "silu"}],
    "meta-llama/Llama-2-7b-hf": [
        {"mlp_bias": True},
        {"hidden_act": "relu"},
        {"is_causal": False},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    "google/gemma-2b": [{"use_bidirectional_attention": True}],
    "google/gemma-2-2b": [{"use_bidirectional_attention": True}],
    "google/gemma-3-1b-pt": [{"attn_logit_softcapping": 50.0}, {"attention_bias": True}],
    "microsoft/Phi-3-mini-4k-instruct": [{"hidden_act": "relu"}],
    "microsoft/phi-2": [{"hidden_act": "silu"}],
    "allenai/OLMo-2-1124-7B": [{"attention_bias": True}],
    "ibm-granite/granite-3.3-2b-instruct": [{"mlp_bias": True}],
    "HuggingFaceTB/SmolLM3-3B": [{"mlp_bias": True}],
    "bigcode/starcoder2-3b": [{"hidden_act": "silu"}, {"residual_dropout": 0.2}],
    "mistralai/Mixtral-8x7B-v0.1": [{"router_jitter_noise": 0.1}, {"hidden_act": "relu"}],
    "Qwen/Qwen3-30B-A3B": [{"attention_bias": True}],
    "unsloth/gpt-oss-20b-BF16": [
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"swiglu_alpha": 1.5},
        {"attention_bias": False},
        {"attention_dropout": 0.1},
    ],
    "allenai/OLMoE-1B-7B-0924": [{"clip_qkv": 8.0}],
    "ibm-granite/granite-3.1-1b-a400m-base": [{"attention_bias": True}],
    "deepseek-ai/DeepSeek-V2-Lite": [{"attention_bias": True}, {"mlp_bias": True}, {"topk_method": "noaux_tc"}],
    "deepseek-ai/DeepSeek-V3": [{"norm_topk_prob": False}, {"num_key_value_heads": 3}],
    "google-bert/bert-base-uncased": [{"is_decoder": True}, {"quantization_config": {"quant_method": "awq"}}],
    "FacebookAI/roberta-base": [{"hidden_act": "relu"}, {"pad_token_id": None}, {"is_decoder": True}],
    "answerdotai/ModernBERT-base": [
        {"mlp_bias": True},
        {"embedding_dropout": 0.1},
        {"attention_dropout": 0.1},
        {"mlp_dropout": 0.1},
        {"classifier_activation": "silu"},
        {"decoder_bias": False},
        {"hidden_activation": "relu", "classifier_activation": "relu"},
    ],
    "google-t5/t5-small": [{"dense_act_fn": "gelu"}, {"is_gated_act": True}],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_changes_numbers_is_refused(name, tmp_path):
    folder = hub_models.write(name, tmp_path / "model")
    whole = (folder / "config.json").read_text()
    for fields in REFUSED[name]:
        edit(folder, **fields)
        with pytest.raises(UnsupportedConfigError, match="rope_type='dynamic'|" + next(iter(fields)) + "="):
            AutoModule.from_pretrained(folder)
        (folder / "config.json").write_text(whole)


def test_fields_at_which_nobody_looks_do_not_refuse(tmp_path):
    """Each would matter to another architecture; transformers' Llama reads none of them."""
    folder = hub_models.write("meta-llama/Llama-3.2-1B", tmp_path / "model")
    edit(folder, residual_multiplier=0.5, sliding_window=3, attention_chunk_size=2, scale_attn_weights=False, note="me")
    assert_same_logits(folder, transformers.LlamaForCausalLM)


def test_a_share_of_positions_that_transformers_does_not_read(tmp_path):
    """Its Llama turns whole heads, whatever is said; a scaled share it cannot compute, and Phi-3 reads it."""
    folder = hub_models.write("meta-llama/Llama-2-7b-hf", tmp_path / "model")
    edit(folder, partial_rotary_factor=0.5)
    assert_same_logits(folder, transformers.LlamaForCausalLM)
    edit(folder, rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(UnsupportedConfigError, match="partial_rotary_factor=0.5 with rope_type='linear'"):
        AutoModule.from_pretrained(folder)
    module = AutoModule.from_pretrained(hub_models.write("google/gemma-2b", tmp_path / "gemma"))
    module.config.rotary_percent = 0.5
    with pytest.raises(UnsupportedConfigError, match="rotary_percent"):
        module.save_pretrained(tmp_path / "out")


def test_the_command_ignores_what_its_error_advises(tmp_path, capsys):
    folder = hub_models.write("openai-community/gpt2", tmp_path / "model")
    edit(folder, is_causal=False)
    with pytest.raises(SystemExit, match=r"ignore=\['is_causal'\]\), or lightning-megatron import --ignore is_causal"):
        main(["import", str(folder), str(tmp_path / "checkpoint")])
    main(["import", "--ignore", "is_causal", str(folder), str(tmp_path / "checkpoint")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "checkpoint")]


def test_a_name_of_the_hub_at_a_revision(tmp_path, monkeypatch):
    """From the cache that a download leaves; the hub itself is not asked."""
    cache = tmp_path / "cache"
    repository = cache / "models--someone--tiny"
    for number, (commit, name) in enumerate((("a" * 40, "main"), ("b" * 40, "v1.0"))):
        hub_models.write("EleutherAI/pythia-160m", repository / "snapshots" / commit)
        edit(repository / "snapshots" / commit, rotary_emb_base=10000 + 100 * number)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    bases = {
        revision: AutoModule.from_pretrained("someone/tiny", revision=revision).config.rotary_base
        for revision in (None, "v1.0", "b" * 40)
    }
    assert bases == {None: 10000, "v1.0": 10100, "b" * 40: 10100}
    with pytest.raises(FileNotFoundError, match="'someone/tiny' is no directory.*did not give it at revision 'v2'"):
        AutoModule.from_pretrained("someone/tiny", revision="v2")


HEADS = {
    "BertForMultipleChoice": ("google-bert/bert-base-uncased", r"classifier\) has no.*'task'.*compares the scores"),
    "BertForNextSentencePrediction": ("google-bert/bert-base-uncased", r"cls\) has no.*'task'.*='pretraining', which"),
    "ModernBertForMultipleChoice": ("answerdotai/ModernBERT-base", r"classifier, head\) has no.*'task'"),
    "GPT2DoubleHeadsModel": ("openai-community/gpt2", r"multiple_choice_head\) has no.*GPT2ForTokenClass.*'task'"),
    "T5ForSequenceClassification": ("google-t5/t5-small", r"classification_head.*T5ForConditionalGeneration"),
}


@pytest.mark.filterwarnings("ignore:.*has no weights for a new head")
@pytest.mark.parametrize("architecture", HEADS)
def test_a_head_without_counterpart_is_named_and_can_be_left_out(architecture, tmp_path):
    name, says = HEADS[architecture]
    source = hub_models.write(name, tmp_path / "source")
    model = getattr(transformers, architecture).from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedConfigError, match=f"is a {architecture}, whose head .*{says}"):
        AutoModule.from_pretrained(tmp_path / "model")
    bert = {"config": {"task": "masked_lm"}} if "Bert" in architecture else {"ignore": ["architectures"]}
    module = AutoModule.from_pretrained(tmp_path / "model", **bert)
    new = {"output_layer.bias", "lm_head.dense.bias", "lm_head.layer_norm.bias"} if "Bert" in architecture else set()
    new -= {"lm_head.dense.bias", "lm_head.layer_norm.bias"} if "Modern" in architecture else set()  # it has none
    assert {ours for ours in module.new_weights if ours.endswith("bias")} == new


@pytest.mark.filterwarnings("ignore:.*has no weights for a new head")
@pytest.mark.parametrize(
    ("architecture", "advised", "ours", "theirs"),
    [
        ("BertForNextSentencePrediction", {"task": "pretraining"}, "binary_head", "cls.seq_relationship"),
        (
            "BertForMultipleChoice",
            {"task": "sequence_classification", "num_labels": 1},
            "classification_head",
            "classifier",
        ),
    ],
)
def test_a_head_without_counterpart_is_loaded_as_advised(architecture, advised, ours, theirs):
    config = transformers.BertConfig(**hub_models.CONFIGS["google-bert/bert-base-uncased"])
    model = getattr(transformers, architecture)(config)
    model.config.architectures = [architecture]
    module = AutoModule.from_pretrained(model, config=advised).build()
    loaded = module.state_dict()
    for name, part in ((ours, theirs), ("pooler.dense", "bert.pooler.dense")):
        assert torch.equal(loaded[f"chunks.0.{name}.weight"], model.get_parameter(f"{part}.weight"))


def test_a_body_without_a_head_starts_one(tmp_path):
    source = hub_models.write("01-ai/Yi-6B", tmp_path / "source")
    transformers.LlamaModel.from_pretrained(source).save_pretrained(tmp_path / "body")
    with pytest.warns(UserWarning, match="no weights for a new head.*\n.*lm_head.weight"):
        assert AutoModule.from_pretrained(tmp_path / "body").new_weights == ["output_layer.weight"]
    weights = load_file(source / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="lm_head.weight is missing"):  # the file of a whole model is damaged
        AutoModule.from_pretrained(source)


def test_weights_that_differ_are_not_tied(tmp_path):
    """transformers does not tie them either, whatever the configuration says."""
    folder = hub_models.write("meta-llama/Llama-3.2-1B", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_same_logits(folder, transformers.LlamaForCausalLM)
    weights["lm_head.weight"][-1] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=re.escape("config={'tie_embeddings': False}")):
        AutoModule.from_pretrained(folder)
    assert_same_logits(folder, transformers.LlamaForCausalLM, config={"tie_embeddings": False})
