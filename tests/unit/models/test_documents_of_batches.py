"""Where a batch's tokens and positions begin documents, ``GPTModule`` keeps them apart in attention."""

import pytest
import torch

from lightning_megatron import GPTConfig, GPTModule

EOD = 4
CONFIG = GPTConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=16, seq_length=8)
TOKENS = torch.tensor([[1, 2, EOD, 1, 2, 3, 1, 2], [1, 2, 3, 1, 2, 3, 1, 2]])
PLACES, JOINED = torch.arange(8), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
BY_TOKENS, BY_POSITIONS = [[0, 0, 0, 1, 1, 1, 1, 1], [0] * 8], [[0, 0, 0, 0, 0, 1, 1, 1]] * 2
BY_BOTH = [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("options", [{}, {"eod_id": EOD, "reset_attention_mask": True}], ids=["positions", "tokens"])
@pytest.mark.parametrize("positions", [None, PLACES[None], PLACES.expand(2, 8), JOINED[None], JOINED.expand(2, 8)])
def test_a_document_begins_where_tokens_or_positions_say(options, positions):
    batch = {"input_ids": TOKENS} if positions is None else {"input_ids": TOKENS, "position_ids": positions}
    found = GPTModule(CONFIG, **options).get_batch(batch)["attention_mask"]
    begins = positions is not None and bool((positions[0] == JOINED).all())
    expected = {(False, False): None, (False, True): BY_TOKENS, (True, False): BY_POSITIONS, (True, True): BY_BOTH}[
        begins, bool(options)
    ]
    assert (None if found is None else found.documents.tolist()) == expected


def test_a_mask_of_the_batch_says_who_looks_where_in_place_of_positions():
    keep = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1] * 8])
    batch = {"input_ids": TOKENS, "position_ids": JOINED.expand(2, 8), "attention_mask": keep}
    found = GPTModule(CONFIG).get_batch(batch)["attention_mask"]
    assert found.documents is None
    assert torch.equal(found.keep, keep.bool())
    assert GPTModule(CONFIG).get_batch({**batch, "attention_mask": torch.ones(2, 8)})["attention_mask"] is None
