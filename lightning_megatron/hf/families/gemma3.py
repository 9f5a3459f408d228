"""Gemma 3, its language model: Gemma 2's shape without a cap on the scores, with norms on queries and keys."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import rope
from lightning_megatron.hf.families.gemma2 import Gemma2


class Gemma3(Gemma2):
    """Five of six layers have a window, and rotary positions of a shorter period."""

    model_type = "gemma3_text"
    expresses = ("norm_placement", "logits_cap", "window_rotary_base")
    extra = {**Gemma2.extra, "qk_layernorm": True}
    heads = {**Gemma2.heads, "sequence_classification": "TextForSequenceClassification"}

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("attn_logit_softcapping", None)  # transformers' class does not apply it
        return super().read_more(fields)

    @override
    def read_rotary(self, fields: Fields) -> dict[str, Any]:
        return rope.read_two(fields)

    @override
    def write_rotary(self, config: Any) -> dict[str, Any]:
        if config.window_rotary_base is None and config.sliding_window is not None:
            self._require(config, rope_scaling=(None,))  # of layers with a window they are not stretched
        return rope.written_two(config)
