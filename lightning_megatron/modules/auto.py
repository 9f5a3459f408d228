"""``AutoModule``: the adapter that a pretrained model needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lightning_megatron import hf
from lightning_megatron.modules.bert import BertModule
from lightning_megatron.modules.configured import ConfiguredModule
from lightning_megatron.modules.gpt import GPTModule
from lightning_megatron.modules.t5 import T5Module

_MODULES: dict[str, type[ConfiguredModule]] = {"GPT": GPTModule, "Bert": BertModule, "T5": T5Module}


class AutoModule:
    """Makes a ``GPTModule``, ``BertModule`` or ``T5Module``, by what a model's configuration says it is."""

    @classmethod
    def from_pretrained(cls, source: str | Path | PreTrainedModel, **arguments: Any) -> ConfiguredModule:
        """As the adapter's own ``from_pretrained``.

        Args:
            source: A directory, a model in memory, or a name on the Hugging Face hub.
            **arguments: Of the adapter's ``from_pretrained``.

        Raises:
            UnsupportedConfigError: An architecture without a counterpart.
        """
        found = hf.open_source(source)
        module = _MODULES[hf.family_of(found.config.model_type).kind]
        return module.from_pretrained(source, **arguments)
