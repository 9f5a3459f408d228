"""A small Llama in a directory, as transformers saves it."""

import pytest
from torch.utils.data import DataLoader

from tests.reference import pretrained


@pytest.fixture
def llama(tmp_path):
    pretrained.new_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def batches(*given):
    return DataLoader(given, batch_size=None)
