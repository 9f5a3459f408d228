"""XLM-RoBERTa: RoBERTa, trained on a hundred languages."""

from __future__ import annotations

from lightning_megatron.hf.families.roberta import Roberta


class XLMRoberta(Roberta):
    """The shape and the tensors' names are RoBERTa's."""

    model_type = "xlm-roberta"
    is_namesake = True
