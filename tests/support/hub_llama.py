"""A small Llama in a directory, as the Hugging Face hub has it."""

import json

import pytest

from tests.reference import hub_models

# As Llama 2's, which transformers reads with a warning and would refuse to write.
GENERATION = {"eos_token_id": [2, 7], "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6, "_note": "é"}


@pytest.fixture
def llama(tmp_path):
    folder = hub_models.write("meta-llama/Llama-3.2-1B", tmp_path / "llama")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder
