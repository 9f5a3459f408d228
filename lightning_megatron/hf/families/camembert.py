"""CamemBERT: RoBERTa, trained on French."""

from __future__ import annotations

from lightning_megatron.hf.families.roberta import Roberta


class Camembert(Roberta):
    """The shape and the tensors' names are RoBERTa's."""

    model_type = "camembert"
    is_namesake = True
