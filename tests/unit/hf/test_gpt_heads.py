"""Heads with labels of all families of GPTs come in from transformers and go out; a causal model is given a new one."""

import copy
import json
import re

import pytest
import torch
import transformers

from lightning_megatron import AutoModule, GPTConfig, GPTModule, LoRA
from lightning_megatron.hf import Family, UnsupportedConfigError
from tests.reference import pretrained

TASKS = {
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
}


def class_of(name: str, ending: str) -> type | None:
    """transformers' class of the family of one of ``pretrained``'s causal models."""
    causal = type(pretrained.new_model(name)).__name__
    begins = re.sub("ForCausalLM|LMHeadModel", "", causal) + ("Text" if causal.startswith("Gemma3") else "")
    return getattr(transformers, begins + ending, None)


CASES = [(name, ending) for name in pretrained.CAUSAL for ending in TASKS if class_of(name, ending)]


def headed(name: str, ending: str) -> transformers.PreTrainedModel:
    config = copy.deepcopy(pretrained.new_model(name).config)
    config.update({"num_labels": 3, "pad_token_id": 0, "classifier_dropout": 0.25})
    torch.manual_seed(len(name))
    model = class_of(name, ending)(config).eval()
    model.config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, float(parameter.dim() == 1 and "gemma" not in name), 0.1)
    return model


@pytest.mark.parametrize(("name", "ending"), CASES)
def test_a_head_comes_in_and_goes_out(name, ending, tmp_path):
    model = headed(name, ending)
    module = AutoModule.from_pretrained(model)
    answers = "Question" in ending  # which have no labels to count, nor a last token to find
    expected = (TASKS[ending], 2, None) if answers else (TASKS[ending], 3, 0)
    assert (module.config.task, module.config.num_labels, module.config.pad_token_id) == expected
    ids = torch.randint(1, pretrained.VOCAB, (5, 23), generator=torch.Generator().manual_seed(4))
    ids[0, 17:], ids[1, :6], ids[2, 9], ids[3, 1:] = 0, 0, 0, 0  # padding behind, in front and within
    mask = (ids != 0).long()
    mask[2] = 1
    with torch.no_grad():
        seen, wanted = (each(input_ids=ids, attention_mask=mask) for each in (module, model))
    wanted = torch.stack(pretrained.logits_in(wanted), -1) if answers else wanted.logits
    seen = torch.stack(seen, -1) if answers else seen
    assert float(wanted.std()) > 0.05, "too small to tell models apart"
    counted = mask.bool() if seen.dim() == 3 else slice(None)
    torch.testing.assert_close(seen[counted], wanted[counted], rtol=0, atol=1e-5)
    module.save_pretrained(tmp_path)
    back, about = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(about.values()), about
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    theirs = {k: v for k, v in model.config.to_diff_dict().items() if k not in ("transformers_version", "dtype")}
    assert {key: back.config.to_dict()[key] for key in theirs} == theirs
    if "Token" in ending:
        assert module.config.classifier_dropout == 0.25


def test_families_of_which_transformers_has_no_head():
    lacking = {name for name in pretrained.CAUSAL if (name, "ForSequenceClassification") not in CASES}
    assert lacking == {"granite", "granitemoe", "olmoe"}
    with pytest.raises(UnsupportedConfigError, match="transformers has no OlmoeForSequenceClassification"):
        AutoModule.from_pretrained(pretrained.new_model("olmoe"), config={"task": "sequence_classification"})
    with pytest.raises(UnsupportedConfigError, match="transformers has no Olmo2ForTokenClassification"):
        AutoModule.from_pretrained(pretrained.new_model("olmo2"), config={"task": "token_classification"})
    with pytest.raises(UnsupportedConfigError, match="transformers has no Gemma3ForTokenClassification"):
        AutoModule.from_pretrained(pretrained.new_model("gemma3"), config={"task": "token_classification"})


def test_a_family_without_heads_says_how_to_have_them():
    assert Family().read_head(None, None) == {} == Family().read_head(None, "causal_lm")
    with pytest.raises(UnsupportedConfigError, match="subclass of lightning_megatron.hf.families.causal.Causal"):
        Family().read_head(None, "sequence_classification")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_causal_model_is_given_a_new_head(name, tmp_path):
    task = {"task": "sequence_classification", "num_labels": 2, "pad_token_id": 7}
    with pytest.warns(UserWarning, match=r"no weights for a new head, which starts anew:\n.*score.weight"):
        module = AutoModule.from_pretrained(pretrained.new_model(name), config=task)
    assert module.new_weights == ["classification_head.weight"]
    module.build()
    weight = module.state_dict()["chunks.0.classification_head.weight"]
    assert weight.shape == (2, 48)
    assert 0.06 < float(weight.std()) < 0.14  # initializer_range=0.1
    assert not any("output_layer" in key for key in module.state_dict())
    module.save_pretrained(tmp_path)
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(back.score.weight, weight)
    assert (back.config.num_labels, back.config.pad_token_id) == (2, 7)
    ids = torch.arange(40).view(2, 20)  # the first row ends with no padding; a 7 in it is none, either
    ids[1, 15:] = 7
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids=ids), back(ids).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="task='sequence_classification'.* gives scores of labels, and no"):
        module.generate(ids)


def test_a_model_with_a_head_is_causal_again():
    model = headed("llama", "ForSequenceClassification")
    with pytest.warns(UserWarning, match="no weights for a new head.*\n.*lm_head.weight"):
        module = AutoModule.from_pretrained(model, config={"task": "causal_lm"})
    assert module.new_weights == ["output_layer.weight"]
    assert module.config.task == "causal_lm"


def test_a_new_head_of_an_adapter_is_score_in_peft(tmp_path):
    task = {"task": "sequence_classification", "num_labels": 3, "pad_token_id": 0}
    with pytest.warns(UserWarning, match="new head"):
        module = AutoModule.from_pretrained(pretrained.new_model("qwen3"), config=task, lora=LoRA(rank=4)).build()
    trained = {name for name, each in module.named_shards() if each.requires_grad and "_lora" not in name}
    assert trained == {"classification_head.weight"}
    for parameter in module.chunks.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.1)
    module.save_adapter(tmp_path / "adapter")
    module.save_pretrained(tmp_path / "merged")
    import peft

    body = copy.deepcopy(pretrained.new_model("qwen3").config)
    body.update({"num_labels": 3, "pad_token_id": 0})
    base = transformers.Qwen3ForSequenceClassification(body)
    base.model.load_state_dict(pretrained.new_model("qwen3").model.state_dict())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    about = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (about["task_type"], about["modules_to_save"]) == ("SEQ_CLS", ["score"])
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(1, 41).view(2, 20)
    with torch.no_grad():
        seen = module.eval()(input_ids=ids)
        torch.testing.assert_close(seen, theirs(ids).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(seen, merged(ids).logits, rtol=0, atol=1e-5)


def test_an_adapter_that_answers_is_qa_outputs_in_peft(tmp_path):
    """transformers' class has the layers under another prefix than the causal model."""
    with pytest.warns(UserWarning, match=r"new head, which starts anew:\n.*qa_outputs.bias.*\n.*qa_outputs.weight"):
        module = AutoModule.from_pretrained(
            pretrained.new_model("qwen3"),
            config={"task": "question_answering"},
            lora=LoRA(targets=["q_proj", "v_proj"]),
        ).build()
    for parameter in module.chunks.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.1)
    module.save_adapter(tmp_path / "adapter")
    module.save_pretrained(tmp_path / "merged")
    import peft

    base = transformers.Qwen3ForQuestionAnswering(copy.deepcopy(pretrained.new_model("qwen3").config))
    base.transformer.load_state_dict(pretrained.new_model("qwen3").model.state_dict())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    about = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (about["task_type"], about["modules_to_save"]) == ("QUESTION_ANS", ["qa_outputs"])
    merged = transformers.Qwen3ForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()
    back = AutoModule.from_pretrained(tmp_path / "merged").eval()
    causal = AutoModule.from_pretrained(tmp_path / "merged", config={"task": "causal_lm"})
    assert causal.new_weights == []  # the output layer is the embedding
    ids = torch.arange(1, 41).view(2, 20)
    with torch.no_grad():
        seen = module.eval()(input_ids=ids)
        for other in (theirs, merged):
            for one, each in zip(seen, pretrained.logits_in(other(ids)), strict=True):
                torch.testing.assert_close(one, each, rtol=0, atol=1e-5)
        torch.testing.assert_close(seen, back(input_ids=ids), rtol=0, atol=1e-5)


def test_a_model_of_ones_own_is_saved_with_its_head(tmp_path):
    config = GPTConfig(
        num_layers=2, hidden_size=24, num_attention_heads=4, vocab_size=65, seq_length=32, task="token_classification",
        num_labels=5, classifier_dropout=0.2,
    )  # fmt: skip
    module = GPTModule(config).build().eval()
    module.save_pretrained(tmp_path)
    back = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert type(back).__name__ == "GPT2ForTokenClassification"
    assert (back.num_labels, back.config.classifier_dropout) == (5, 0.2)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids=ids), back(ids).logits, rtol=0, atol=1e-5)
