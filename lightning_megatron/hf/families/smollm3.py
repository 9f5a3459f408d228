"""SmolLM 3: Llama's shape, of whose layers some do not rotate queries and keys."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import layer_types
from lightning_megatron.hf.families.llama import Llama


class SmolLM3(Llama):
    """Layers without rotary positions know the order of tokens from the others; some may have a window."""

    model_type = "smollm3"
    expresses = ("rotary_layers",)

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        rotates = fields("no_rope_layers")[: fields("num_hidden_layers")]  # 1 where a layer does
        fields("no_rope_layer_interval")  # transformers has put it into `no_rope_layers`
        layers = [number for number, does in enumerate(rotates) if does]
        fields.must_be("mlp_bias", fields("attention_bias"))
        return {
            "bias": fields("mlp_bias"),
            "rotary_layers": None if all(rotates) else layers,
            **layer_types.read(fields),
        }

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        self._require(config, qkv_bias=(None, config.bias), extra=({},))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        layers = range(config.num_layers) if config.rotary_layers is None else config.rotary_layers
        return {
            "attention_bias": config.bias,
            "mlp_bias": config.bias,
            "no_rope_layers": [int(number in layers) for number in range(config.num_layers)],
            **layer_types.written(config),
        }
