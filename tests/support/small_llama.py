"""A small Llama in a directory: as transformers saves it, or as the Hugging Face hub has it."""

import json
from pathlib import Path

from torch.utils.data import DataLoader

from tests.reference import hub_models, pretrained

# As Llama 2's, which transformers reads with a warning and would refuse to write.
GENERATION = {"eos_token_id": [2, 7], "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6, "_note": "é"}


def saved_llama(folder: Path) -> Path:
    pretrained.new_model("llama").save_pretrained(folder)
    return folder


def hub_llama(folder: Path) -> Path:
    hub_models.write("meta-llama/Llama-3.2-1B", folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def batches(*given):
    return DataLoader(given, batch_size=None)
