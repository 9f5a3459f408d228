"""Where a T5's pipeline is split between encoder and decoder."""

from dataclasses import replace

import pytest

from lightning_megatron import T5Config
from tests.reference import plain_t5
from tests.support.t5_split import split

CONFIG = T5Config(**{**plain_t5.SIZES, "num_layers": 12, "decoder_num_layers": None, "decoder_seq_length": 37})


@pytest.mark.parametrize(("pp", "first"), [(1, None), (2, 1), (4, 2), (5, 2), (8, 4), (24, 12)])
def test_layers_of_the_decoder_cost_more(pp, first):
    assert split(CONFIG, pp=pp) == first


def test_cross_attention_is_counted():
    assert split(replace(CONFIG, decoder_seq_length=33), pp=3) == 1  # for its shorter targets alone it would be 2


def test_the_split_follows_lengths_and_layers():
    assert split(replace(CONFIG, seq_length=512, decoder_seq_length=16), pp=5) == 4
    assert split(replace(CONFIG, seq_length=16, decoder_seq_length=512), pp=5) == 1
    assert split(replace(CONFIG, decoder_num_layers=2), pp=4) == 3
    assert split(CONFIG, pp=2, vp=4) == split(CONFIG, pp=8) == 4


def test_a_split_that_is_asked_for_is_kept():
    assert [split(CONFIG, pp=4, pipeline_split_rank=first) for first in (1, 2, 3)] == [1, 2, 3]
