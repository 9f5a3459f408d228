"""Llama 2 and 3; other families of its shape build on it."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import rope, sizes
from lightning_megatron.hf.families.causal import Causal
from lightning_megatron.hf.weight_mapping import QueryKeyValue, Stacked, WeightMapping, table


class Llama(Causal):
    """Rotary positions, RMSNorm, a gated feed-forward layer and grouped queries."""

    model_type = "llama"
    prefix = "model."
    buffers = (r".*rotary_emb\.inv_freq",)
    activation_field = "hidden_act"
    activations: ClassVar[dict[str, str]] = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu"}
    partial_rotary = False  # whether transformers' class can turn a part of each head
    norms: tuple[tuple[str, str], ...] = (  # of a layer: our names and theirs
        ("input_layernorm", "input_layernorm"),
        ("pre_mlp_layernorm", "post_attention_layernorm"),
    )

    @override
    def read_config(self, fields: Fields) -> dict[str, Any]:
        heads = fields("num_attention_heads")
        size = getattr(fields.config, "head_dim", None) or fields("hidden_size") // heads
        fields.must_be("head_dim", size, None)
        return {
            **sizes.read(fields),
            "kv_channels": size,
            "activation": fields.one_of(self.activation_field, self.activations),
            "normalization": "RMSNorm",
            "layernorm_epsilon": fields("rms_norm_eps"),
            **self.read_rotary(fields),
            **self.read_more(fields),
        }

    def read_more(self, fields: Fields) -> dict[str, Any]:
        """What differs between the families of this shape."""
        fields.must_be("mlp_bias", fields("attention_bias"))
        return {"bias": fields("mlp_bias")}

    def read_rotary(self, fields: Fields) -> dict[str, Any]:
        """Read how positions are rotated."""
        return rope.read(fields, self.partial_rotary)

    @override
    def write_config(self, config: Any) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in self.activations.items()}
        self._require(config, position_embedding=("rope",), normalization=("RMSNorm",))
        self._require(config, activation=tuple(activations), parallel_residual=(False,))
        if not self.partial_rotary:
            self._require(config, rotary_percent=(1.0,))
        return {
            **sizes.written(config),
            "head_dim": config.kv_channels or config.hidden_size // config.num_attention_heads,
            self.activation_field: activations[config.activation],
            "rms_norm_eps": config.layernorm_epsilon,
            "rope_parameters": self.write_rotary(config),
            **self.write_more(config),
        }

    def write_more(self, config: Any) -> dict[str, Any]:
        """What differs between the families of this shape."""
        self._require(config, qkv_bias=(None, config.bias), sliding_window=(None,), extra=({},))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        return {"attention_bias": config.bias, "mlp_bias": config.bias}

    def write_rotary(self, config: Any) -> dict[str, Any]:
        """Their ``rope_parameters``."""
        return rope.written(config)

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        ours, theirs = "decoder.layers.{}.", "model.layers.{}."
        entries: dict[str, Any] = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            **{f"{ours}{here}.weight": f"{theirs}{there}.weight" for here, there in self.norms},
            "decoder.final_layernorm.weight": "model.norm.weight",
            **self.linear_layers(ours, theirs, "weight"),
        }
        with_bias = self.linear_layers(ours, theirs, "bias")
        if config.bias:
            entries |= with_bias
        elif config.qkv_bias:
            entries |= {name: mapped for name, mapped in with_bias.items() if "linear_qkv" in name}
        if config.extra.get("qk_layernorm"):
            for kind in ("q", "k"):
                entries[f"{ours}self_attention.{kind}_layernorm.weight"] = f"{theirs}self_attn.{kind}_norm.weight"
        return table(entries | self.output_layers(config), config.num_layers)

    def linear_layers(self, ours: str, theirs: str, kind: str) -> dict[str, Any]:
        """The linear layers' weights or biases."""
        query_key_value = tuple(f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv")
        return {
            f"{ours}self_attention.linear_qkv.{kind}": QueryKeyValue(query_key_value),
            f"{ours}self_attention.linear_proj.{kind}": f"{theirs}self_attn.o_proj.{kind}",
            f"{ours}mlp.linear_fc1.{kind}": Stacked((f"{theirs}mlp.gate_proj.{kind}", f"{theirs}mlp.up_proj.{kind}")),
            f"{ours}mlp.linear_fc2.{kind}": f"{theirs}mlp.down_proj.{kind}",
        }
