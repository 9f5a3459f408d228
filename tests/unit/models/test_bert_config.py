"""Configurations of a BERT that do not exist are refused."""

import pytest
import torch

from lightning_megatron import BertConfig, BertModule
from tests.reference import plain_bert
from tests.reference.plain_gpt import ADAM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "masked_ml"}, "Did you mean 'masked_lm'"),
        ({"norm_placement": "before"}, "norm_placement 'before'"),
        ({"task": "sequence_classification", "problem_type": "multi_label"}, "multi_label_classification"),
        ({"problem_type": "regression"}, "only task='sequence_classification'"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"task": "question_answering", "num_labels": 3}, "Use num_labels=2"),
        ({"activation": "swiglu"}, "cannot gate"),
        ({"layers": "transformer_engine"}, "Use layers='torch'"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"hidden_dropout": 1.5}, "BertConfig.hidden_dropout=1.5"),
    ],
)
def test_configurations_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**{**plain_bert.SIZES, **options})


def test_the_module_wants_its_config():
    with pytest.raises(TypeError, match="use a BertConfig"):
        BertModule({"num_layers": 2}, optimizer=lambda p: torch.optim.AdamW(p, **ADAM))
