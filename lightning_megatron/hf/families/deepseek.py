"""What DeepSeek-V2 and V3 share: multi-latent attention, a few dense layers, and experts in all others."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError
from lightning_megatron.hf.families.mixture import Mixture
from lightning_megatron.hf.weight_mapping import Stacked, WeightMapping, table

_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EPSILON = 1e-6  # of the norms of latents in transformers' classes, whatever the configuration says


class Deepseek(Mixture):
    """A base class of families."""

    expresses = ("latent_attention", *Mixture.expresses)
    parts = ("latent_attention", *Mixture.parts)

    @override
    def read_config(self, fields: Fields) -> dict[str, Any]:
        found = super().read_config(fields)
        fields.must_be("num_key_value_heads", found["num_attention_heads"])
        fields("qk_head_dim")  # a sum
        return {**found, "num_query_groups": None, "kv_channels": None}

    @override
    def read_more(self, fields: Fields) -> dict[str, Any]:
        return {
            "bias": fields.must_be("attention_bias", False),
            "latent_attention": {
                **{name: fields(name) for name in _SIZES},
                "rope_interleave": self.read_interleave(fields),
                "norm_epsilon": _EPSILON,
            },
            "experts": self._read_mixture(fields),
        }

    def read_interleave(self, fields: Fields) -> bool:
        """Whether the channels of a pair that is rotated lie side by side."""
        return True

    @abstractmethod
    def read_router(self, fields: Fields) -> dict[str, Any]:
        """Arguments of ``Experts`` that say how they are chosen."""

    @override
    def write_config(self, config: Any) -> dict[str, Any]:
        found = super().write_config(config)
        del found["head_dim"]  # follows from the others
        return found

    @override
    def write_more(self, config: Any) -> dict[str, Any]:
        latent = config.latent_attention
        if latent is None:
            raise UnsupportedConfigError(
                f"GPTConfig(latent_attention=None) cannot be saved as a {self.model_type}, which has it."
            )
        self._require(config, bias=(False,), qkv_bias=(None,), extra=({},), sliding_window=(None,))
        self._require(config, hidden_dropout=(0.0,), embedding_multiplier=(1.0,))
        as_model = (None,) if config.layernorm_epsilon == _EPSILON else ()
        self._require(latent, norm_epsilon=(_EPSILON, *as_model))
        return {
            **{name: getattr(latent, name) for name in _SIZES},
            **self.write_interleave(latent),
            **self._write_mixture(config),
            "attention_bias": False,
        }

    def write_interleave(self, latent: Any) -> dict[str, Any]:
        """Their fields of how channels are rotated."""
        self._require(latent, rope_interleave=(True,))
        return {}

    @abstractmethod
    def write_router(self, experts: Any) -> dict[str, Any]:
        """Their fields of how experts are chosen."""

    def _read_mixture(self, fields: Fields) -> dict[str, Any] | None:
        """Arguments of ``Experts``; None where all layers are dense."""
        dense, count = fields("first_k_dense_replace"), fields("num_hidden_layers")
        width = fields("moe_intermediate_size")
        fields("output_router_logits")  # transformers' classes have no loss of them
        found = {
            "num": fields("n_routed_experts"),
            "top_k": fields("num_experts_per_tok"),
            "ffn_hidden_size": width,
            "shared_ffn_hidden_size": fields("n_shared_experts") * width,
            "scale": fields("routed_scaling_factor"),
            "layers": list(range(dense, count)) if dense else None,
            **self.read_router(fields),
        }
        return found if dense < count else None

    def _write_mixture(self, config: Any) -> dict[str, Any]:
        experts, layers = config.experts, config.num_layers
        if experts is None:
            return {"first_k_dense_replace": layers}
        self._require(experts, capacity_factor=(None,), shared_gate=(False,))
        has = experts.in_layers(layers)
        dense = has.index(True)
        if not all(has[dense:]):
            raise UnsupportedConfigError(
                f"Experts(layers={experts.layers}) cannot be saved as a {self.model_type}, in which all layers but the"
                " first ones have experts."
            )
        width = experts.ffn_hidden_size or config.ffn_hidden_size or 4 * config.hidden_size
        shared, rest = divmod(experts.shared_ffn_hidden_size or 0, width)
        if rest or not shared:
            raise UnsupportedConfigError(
                f"Experts(shared_ffn_hidden_size={experts.shared_ffn_hidden_size}) cannot be saved as a"
                f" {self.model_type}, whose shared experts are as wide as the others: a multiple of {width}."
            )
        return {
            "first_k_dense_replace": dense,
            "n_routed_experts": experts.num,
            "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": width,
            "n_shared_experts": shared,
            "routed_scaling_factor": experts.scale,
            **self.write_router(experts),
        }

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        names = {"linear_kv_down_proj": "kv_a_proj_with_mqa", "linear_kv_up_proj": "kv_b_proj"}
        names |= {"kv_layernorm": "kv_a_layernorm"}
        if config.latent_attention.q_lora_rank is None:
            names |= {"linear_q_proj": "q_proj"}
        else:
            names |= {"linear_q_down_proj": "q_a_proj", "q_layernorm": "q_a_layernorm", "linear_q_up_proj": "q_b_proj"}
        ours, theirs = "decoder.layers.{}.self_attention.", "model.layers.{}.self_attn."
        attention = {f"{ours}{here}.weight": f"{theirs}{there}.weight" for here, there in names.items()}
        found = {name: mapped for name, mapped in super().weight_mapping(config).items() if "linear_qkv" not in name}
        return found | table(attention, config.num_layers)

    @override
    def expert_layer(self, ours: str, theirs: str, config: Any) -> dict[str, Any]:
        shared = f"{theirs}shared_experts."
        found = {
            **super().expert_layer(ours, theirs, config),
            f"{ours}shared_experts.linear_fc1.weight": Stacked(
                (f"{shared}gate_proj.weight", f"{shared}up_proj.weight")
            ),
            f"{ours}shared_experts.linear_fc2.weight": f"{shared}down_proj.weight",
        }
        if config.experts.balancing == "bias":
            found[f"{ours}router.expert_bias"] = f"{theirs}{self.router}.e_score_correction_bias"
        return found
