"""What families with experts share: Llama's shape, with a router and experts in place of feed-forward layers."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError
from lightning_megatron.hf.families.llama import Llama
from lightning_megatron.hf.weight_mapping import WeightMapping, table


class Mixture(Llama):
    """A base class of families.

    Attributes:
        block: transformers' name, in a layer, of the router and experts.
        router: transformers' name, in such a block, of the router's layer.
        normalized: Whether the weights of a token's experts add up to 1; None: the configuration says so.
    """

    expresses: ClassVar[tuple[str, ...]] = ("experts",)
    parts: ClassVar[tuple[str, ...]] = ("experts",)
    block = "mlp"
    router = "gate"
    normalized: bool | None = None

    def read_experts(self, fields: Fields, num: str, **settings: Any) -> dict[str, Any]:
        """Arguments of ``Experts`` for those that a configuration describes; ``num`` is its name of their number.

        transformers balances experts where ``output_router_logits`` says so, with the weight that is kept in any case.
        """
        normalized = fields("norm_topk_prob") if self.normalized is None else self.normalized
        return {
            "num": fields(num),
            "top_k": fields("num_experts_per_tok"),
            "normalize_top_k": normalized,
            "balancing": "global_aux" if fields("output_router_logits") else "none",
            "aux_weight": fields("router_aux_loss_coef"),
            **settings,
        }

    def write_experts(self, config: Any, num: str) -> dict[str, Any]:
        """Their fields of the experts.

        Raises:
            UnsupportedConfigError: The family has no such experts.
        """
        experts = config.experts
        if experts is None:
            raise UnsupportedConfigError(
                f"GPTConfig(experts=None) cannot be saved as a {self.model_type}, which has experts."
            )
        self._require(experts, router=("softmax",), capacity_factor=(None,), scale=(1.0,), groups=(None,))
        found = {num: experts.num, "num_experts_per_tok": experts.top_k, "router_aux_loss_coef": experts.aux_weight}
        if self.normalized is None:
            return {**found, "norm_topk_prob": experts.normalize_top_k}
        self._require(experts, normalize_top_k=(self.normalized,))
        return found

    def width_of_experts(self, config: Any) -> int:
        """The width of each expert, where all layers have experts and there is no other feed-forward layer.

        Raises:
            UnsupportedConfigError: There are others.
        """
        if not all(config.experts.in_layers(config.num_layers)):
            raise UnsupportedConfigError(
                f"Experts(layers={config.experts.layers}) cannot be saved as a {self.model_type}, which has experts in"
                " all layers."
            )
        self._require(config.experts, shared_ffn_hidden_size=(None,))
        return int(config.experts.ffn_hidden_size or config.ffn_hidden_size or 4 * config.hidden_size)

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        found = super().weight_mapping(config)
        for number, has in enumerate(config.experts.in_layers(config.num_layers) if config.experts else ()):
            if has:
                ours, theirs = f"decoder.layers.{number}.mlp.", f"model.layers.{number}.{self.block}."
                found = {name: mapped for name, mapped in found.items() if not name.startswith(ours)}
                found |= table(self.expert_layer(ours, theirs, config))
        return found

    def expert_layer(self, ours: str, theirs: str, config: Any) -> dict[str, Any]:
        """The tensors of a layer's router and experts."""
        return {
            f"{ours}router.weight": f"{theirs}{self.router}.weight",
            f"{ours}experts.linear_fc1.weight": f"{theirs}experts.gate_up_proj",
            f"{ours}experts.linear_fc2.weight": f"{theirs}experts.down_proj",
        }
