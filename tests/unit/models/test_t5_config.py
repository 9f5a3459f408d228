"""Configurations of a T5 that do not exist are refused."""

import pytest

from lightning_megatron import T5Config, T5Module
from tests.reference import plain_t5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "RMS"}, "Did you mean 'RMSNorm'"),
        ({"activation": "relux"}, "Did you mean 'relu'"),
        ({"layers": "transformer_engine"}, "Use layers='torch'"),
        ({"decoder_num_layers": 0}, "decoder_num_layers=0"),
        ({"relative_attention_num_buckets": 7}, "multiple of 4"),
        ({"relative_attention_max_distance": 4}, "above half"),
        ({"position_embedding": "absolute"}, "Did you mean 'relative'|'learned'"),
        ({"extra": {"num_layers_in_first_pipeline_stage": 1}}, "num_layers_in_first_pipeline_stage.*split_rank"),
        ({"decoder_start_id": 211}, "decoder_start_id=211"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
    ],
)
def test_configurations_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**{**plain_t5.SIZES, **options})


def test_the_module_wants_its_config():
    with pytest.raises(TypeError, match="use a T5Config"):
        T5Module({"num_layers": 2})
