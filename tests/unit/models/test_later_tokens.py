"""What layers of multi-token prediction are given of rows, however these say which documents share them."""

from dataclasses import replace

import pytest
import torch

from lightning_megatron import GPTConfig, LayoutError, ParallelLayout
from lightning_megatron.models.gpt.multi_token_prediction import later_tokens
from lightning_megatron.models.layers.attention_pattern import AttentionPattern

CONFIG = GPTConfig(
    num_layers=4, hidden_size=8, num_attention_heads=2, vocab_size=16, seq_length=8, position_embedding="rope"
)


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


@pytest.mark.parametrize(
    ("change", "told"),
    [({"mtp": 5}, "num_layers=4"), ({"mtp": 3, "seq_length": 3}, "fewer than the tokens of a row")],
    ids=str,
)
def test_too_many_depths(change, told):
    with pytest.raises(ValueError, match=rf"mtp={change['mtp']}.*{told}.*Use 1"):
        replace(CONFIG, **change)


@pytest.mark.parametrize("text", ["Ett|ttmmL", "Ett|tt,m*2,L"])
def test_letters_of_a_text_are_those_of_the_model(text):
    layout = ParallelLayout(world_size=2, pp=2, layers_per_stage=text)
    replace(CONFIG, mtp=2).check(layout)
    replace(CONFIG, mtp=1).check(ParallelLayout(world_size=2, pp=2, layers_per_stage="Ett|ttL"))  # names none
    with pytest.raises(LayoutError, match=r"has 2 letters m.*GPTConfig\(mtp=1\)"):
        replace(CONFIG, mtp=1).check(replace(layout, sequence_parallel=True))
    named = {"pipeline_model_parallel_layout": text}
    with pytest.raises(LayoutError, match=r"has 2 letters m.*GPTConfig\(mtp=0\)"):
        replace(CONFIG, extra=named).check(ParallelLayout(world_size=2, pp=2))
