"""Every key that transformers' models take in a batch is met, or refused by name; what they ignore is ignored."""

import inspect
from typing import Any

import pytest
import torch
import transformers

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule, T5Config, T5Module
from lightning_megatron.models.batch_checks import UNMET
from tests.reference import pretrained

SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 16, "seq_length": 8}
IDS = torch.arange(8).view(2, 4)
MODULES: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "learned": (GPTModule(GPTConfig(**SIZES)), {"input_ids": IDS}),
    "rotary": (GPTModule(GPTConfig(**SIZES, position_embedding="rope")), {"input_ids": IDS}),
    "bert": (BertModule(BertConfig(**SIZES)), {"input_ids": IDS, "labels": IDS}),
    "t5": (T5Module(T5Config(**SIZES)), {"input_ids": IDS, "labels": IDS}),
}
CLASSES = {
    "learned": ["GPT2LMHeadModel"],
    "rotary": [
        f"{name}ForCausalLM" for name in ("Llama", "GPTNeoX", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3")
    ],
    "bert": [
        f"BertFor{task}"
        for task in ("MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    ],
    "t5": ["T5ForConditionalGeneration"],
}  # fmt: skip
MET = {"input_ids", "attention_mask", "position_ids", "labels", "token_type_ids", "next_sentence_label"}
MET |= {"decoder_input_ids", "decoder_attention_mask", "start_positions", "end_positions"}
FLAGS = {"use_cache"}


@pytest.mark.parametrize("family", CLASSES)
def test_transformers_takes_nothing_else(family):
    for name in CLASSES[family]:
        parameters = set(inspect.signature(getattr(transformers, name).forward).parameters) - {"self", "kwargs"}
        assert parameters <= MET | FLAGS | UNMET.keys(), name


@pytest.mark.parametrize("family", MODULES)
def test_what_is_not_met_is_refused_by_name(family):
    module, batch = MODULES[family]
    for key in UNMET:
        with pytest.raises(
            ValueError, match=f"{type(module).__name__}: '{key}' in the batch has no counterpart here: "
        ):
            module.check_batch({**batch, key: torch.ones(2, 4)})


def test_what_means_something_to_one_family_only():
    learned, rotary = (MODULES[name][0] for name in ("learned", "rotary"))
    types = {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)}
    with pytest.raises(ValueError, match="'token_type_ids'.*GPT-2 adds the embedding"):
        learned.check_batch(types)
    rotary.check_batch(types)


def test_what_transformers_ignores_is_ignored_and_none_is_not_given():
    model = pretrained.new_model("llama")
    module = GPTModule.from_pretrained(model).build()
    more = {"length": torch.tensor([4, 4]), "text": ["a", "b"], "use_cache": False, "token_type_ids": None}
    more |= {"attention_mask": None, "position_ids": None, "past_key_values": None}
    module.check_batch({"input_ids": IDS, "labels": None, **more})
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids=IDS, labels=None, **more), model(IDS).logits, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="'inputs_embeds' in the batch"):
            module(input_ids=IDS, inputs_embeds=torch.ones(2, 4, 48))
