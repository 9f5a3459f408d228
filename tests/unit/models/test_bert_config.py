"""Configurations of a BERT that do not exist are refused."""

import pytest
import torch

from lightning_megatron import BertConfig, BertModule
from lightning_megatron.models.flops import layer_flops, training_flops
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
        ({"extra": {"gated_linear_unit": True}}, "activation='geglu'"),
        ({"num_token_types": -1}, "num_token_types=-1"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"sliding_window": 4, "sliding_window_layers": [8]}, "no layer 8; num_layers=8"),
        ({"sliding_window_layers": [1]}, "needs sliding_window, how far it reaches"),
        ({"window_rotary_base": 10.0, "sliding_window": 4}, "position_embedding='rope' and sliding_window"),
        ({"window_rotary_base": 10.0, "position_embedding": "rope"}, "position_embedding='rope' and sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "needs position_embedding='rope'"),
        ({"rope_scaling": {"rope_type": "dynamic"}, "position_embedding": "rope"}, "unknown rope_type 'dynamic'"),
        ({"position_padding_id": 1, "position_embedding": "rope"}, "needs position_embedding='learned'"),
        ({"position_embedding": "none"}, "unknown position_embedding 'none'"),
        ({"classifier_head": "mean"}, "unknown classifier_head 'mean'"),
        ({"classifier_pooling": "mean"}, "needs classifier_head='transform'"),
        ({"layers": "transformer_engine"}, "Use layers='torch'"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"hidden_dropout": 1.5}, "BertConfig.hidden_dropout=1.5"),
    ],
)
def test_configurations_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**{**plain_bert.SIZES, **options})


def test_what_a_query_sees_counts_for_each_layer():
    """Two layers of five have all 100 keys, and three a window of 2 · 9 + 1."""
    shape = {"num_layers": 5, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16, "seq_length": 100}
    config = BertConfig(**shape, sliding_window=9, sliding_window_layers=[1, 2, 4])
    (stack,) = config.stacks((100,))
    assert [config.layer_work(stack, number)[0] for number in range(5)] == [100, 19, 19, 100, 19]
    assert stack.attention == [(100, (2 * 100 + 3 * 19) / 5)]
    assert sum(map(sum, layer_flops(config))) * 3 + 3 * 2 * 100 * 8 * 16 == pytest.approx(
        training_flops(config, (100,))
    )
    plain = BertConfig(**shape)
    assert plain.layer_work(plain.stacks((100,))[0], 0)[0] is None


def test_tokens_without_types_may_say_zero_alone():
    module = BertModule(BertConfig(**plain_bert.SIZES, num_token_types=0))
    tokens = torch.ones(2, 9, dtype=torch.long)
    module._check_loaded({"input_ids": tokens, "labels": tokens, "token_type_ids": tokens * 0})
    with pytest.raises(ValueError, match="token_type_ids.*num_token_types"):
        module._check_loaded({"input_ids": tokens, "labels": tokens, "token_type_ids": tokens})


def test_the_module_wants_its_config():
    with pytest.raises(TypeError, match="use a BertConfig"):
        BertModule({"num_layers": 2}, optimizer=lambda p: torch.optim.AdamW(p, **ADAM))
