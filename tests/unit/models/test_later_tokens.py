"""What layers of multi-token prediction are given of rows, however these say which documents share them."""

import pytest
import torch

from lightning_megatron.models.gpt.multi_token_prediction import later_tokens
from lightning_megatron.models.layers.attention_pattern import AttentionPattern


@pytest.mark.parametrize("depths", [1, 3, 9])
def test_a_mask_says_the_same_as_documents(depths):
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
    tokens = torch.arange(documents.numel()).view_as(documents)
    inputs = {"input_ids": tokens, "labels": tokens + 1, "loss_mask": torch.ones(documents.shape)}
    pattern = AttentionPattern(length=7, documents=documents)
    masks = (pattern, pattern.dense(None, tokens.device))
    found = [later_tokens({**inputs, "attention_mask": mask}, depths) for mask in masks]
    assert found[0].weights[0].tolist() == [[1, 1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0]]
    for each, other in zip(*found, strict=True):
        assert each.shape == other.shape == (depths, 3, 7)
        assert torch.equal(each, other)
