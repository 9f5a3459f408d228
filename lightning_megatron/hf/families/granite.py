"""Granite, its dense models: Llama's shape, with multipliers on embeddings, scores, residual branches and logits."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.llama import Llama


class Granite(Llama):
    """The multipliers let one learning rate serve models of all widths."""

    model_type = "granite"
    expresses: ClassVar[tuple[str, ...]] = ("residual_multiplier", "logits_divisor")

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("mlp_bias", fields("attention_bias"))
        return {"bias": fields("mlp_bias"), **self.read_multipliers(fields)}

    def read_multipliers(self, fields: Fields) -> dict[str, Any]:
        """Read the four factors that Granite multiplies by."""
        return {
            "embedding_multiplier": fields("embedding_multiplier"),
            "residual_multiplier": fields("residual_multiplier"),
            "logits_divisor": fields("logits_scaling"),
            "extra": {"softmax_scale": fields("attention_multiplier")},
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, qkv_bias=(None, config.bias), sliding_window=(None,), hidden_dropout=(0.0,))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        return {"attention_bias": config.bias, "mlp_bias": config.bias, **self.write_multipliers(config)}

    def write_multipliers(self, config: Any) -> dict[str, Any]:
        """Their fields of the four multipliers."""
        scale = config.extra.get("softmax_scale", (config.kv_channels or 1) ** -0.5)
        self._require(config, extra=({"softmax_scale": scale},))
        return {
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "logits_scaling": config.logits_divisor,
            "attention_multiplier": scale,
        }
