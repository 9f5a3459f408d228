"""What megatron-core is given while it only notes how its weights are drawn."""

import torch
from megatron.core.transformer import TransformerConfig

from lightning_megatron.models.weight_init import FirstWeights


def test_the_weight_comes_back():
    """megatron-core keeps what it is given for the offset of a softmax: None was no offset at all."""
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    FirstWeights(config)
    weight = torch.zeros(3)
    assert config.init_method(weight) is weight
