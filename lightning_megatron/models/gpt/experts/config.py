"""``Experts``: how many experts a GPT's layers have, which of them a token uses, and what keeps them equally busy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_megatron.checkpoint.plain_classes import plain_class
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

RouterScores = Literal["softmax", "sigmoid"]
Balancing = Literal["aux", "seq_aux", "global_aux", "bias", "none"]

# megatron-core's fields that the arguments below stand for.
_OWN_FIELDS = {
    "num_moe_experts": "num",
    "moe_router_topk": "top_k",
    "moe_ffn_hidden_size": "ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "shared_ffn_hidden_size",
    "moe_shared_expert_gate": "shared_gate",
    "moe_router_score_function": "router",
    "moe_router_pre_softmax": "normalize_top_k",
    "moe_router_load_balancing_type": "balancing",
    "moe_router_enable_expert_bias": "balancing",
    "moe_aux_loss_coeff": "aux_weight",
    "moe_z_loss_coeff": "z_weight",
    "moe_router_bias_update_rate": "bias_rate",
    "moe_expert_capacity_factor": "capacity_factor",
    "moe_layer_freq": "layers",
    "moe_router_num_groups": "groups",
    "moe_router_group_topk": "top_k_groups",
    "moe_router_topk_scaling_factor": "scale",
}
# Those that layers of experts here do not read, and what to use.
_NOT_READ = {
    "moe_token_dispatcher_type": "use MegatronStrategy(kernels=Kernels(expert_dispatch='alltoall')) or 'allgather'",
    "moe_enable_deepep": "use MegatronStrategy(kernels=Kernels(expert_dispatch='alltoall')) or 'allgather'",
    "overlap_moe_expert_parallel_comm": "leave it out; no schedule here overlaps micro-batches",
    "moe_apply_probs_on_input": "leave it out; a token's weights multiply what its experts give",
    "moe_layer_recompute": "use MegatronStrategy(recompute=['mlp'])",
    "moe_per_layer_logging": "use the callback TrainingMonitor",
}


@answer_wrong_names
@plain_class
@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the feed-forward layer: a router sends each token to ``top_k`` of them.

    The losses that balance the experts are weighed as the loss of the text is: each token that the loss mask keeps
    counts once in the global batch, whatever the micro-batches, replicas and accumulated batches. They are added over
    the layers, they have gradients, and the logged loss is without them. With ``f`` the share of the choices that fell
    on an expert, and ``p`` its share of the router's scores, a token's loss is ``aux_weight · num · Σ f p`` (Fedus and
    others, "Switch Transformers", 2021, section 2.2).

    Args:
        num: Experts of a layer.
        top_k: Experts that each token uses.
        ffn_hidden_size: Width of an expert's feed-forward layer. None: the model's ``ffn_hidden_size``.
        shared_ffn_hidden_size: Width of a further feed-forward layer that all tokens use; of several shared experts,
            their sum. None: there is none.
        shared_gate: Whether that layer's output is multiplied by a number between 0 and 1, the sigmoid of a product
            with the token, as in Qwen2-MoE.
        router: How scores are made of the router's logits: "softmax" over all experts, or "sigmoid" of each.
        normalize_top_k: Whether the weights of a token's ``top_k`` experts add up to 1.
        scale: Factor on these weights.
        groups: The experts of a layer are in this many groups, of neighbours and of one size, and those of a token in
            ``top_k_groups`` of them: where a machine holds a group, a token travels to few (DeepSeek-V2, arXiv
            2405.04434, section 2.2.2). None: a token's experts may be any.
        top_k_groups: Groups in which a token's experts are.
        group_scores: A group's rank is by the sum of so many of its best scores: 1 in DeepSeek-V2, 2 in V3.
        balancing: What keeps the experts equally busy. "aux": a loss, ``f`` counted in each micro-batch, as in
            Megatron-LM; its value depends on what a micro-batch is. "seq_aux": ``f`` counted in each sequence.
            "global_aux": ``f`` counted in the global batch before this one, so that its micro-batches need not wait
            for one another; the first batch is not balanced. "bias": no loss; each expert's bias, which is added to
            the scores that choose, rises by ``bias_rate`` after a global batch in which the expert had less than its
            share, and falls otherwise (Wang and others, "Auxiliary-Loss-Free Load Balancing", 2024). "none".
        aux_weight: Weight of the loss of "aux", "seq_aux" or "global_aux".
        z_weight: Weight of ``(log Σ exp(logits))²``, which keeps the router's logits small (Zoph and others, "ST-MoE",
            2022, equation 5); 1e-3 there.
        bias_rate: Step of the biases under "bias".
        capacity_factor: An expert takes at most this multiple of its share of a rank's tokens of a micro-batch, those
            with the highest scores; the others go without it. None: it takes all.
        eval_capacity_factor: The same in validation, tests, predictions and generation. None: it takes all.
        layers: Numbers, from 0, of the layers that have experts; the others have one feed-forward layer. None: all.

    Raises:
        ValueError: A number out of range, or a choice that does not exist.
    """

    num: int
    top_k: int = 2
    ffn_hidden_size: int | None = None
    shared_ffn_hidden_size: int | None = None
    shared_gate: bool = False
    router: RouterScores = "softmax"
    normalize_top_k: bool = True
    scale: float = 1.0
    groups: int | None = None
    top_k_groups: int | None = None
    group_scores: int = 2
    balancing: Balancing = "global_aux"
    aux_weight: float = 1e-2
    z_weight: float = 0.0
    bias_rate: float = 1e-3
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and choices that do not exist."""
        arguments = Arguments("Experts")
        arguments.whole(num=self.num, top_k=self.top_k)
        arguments.whole(
            optional=True, ffn_hidden_size=self.ffn_hidden_size, shared_ffn_hidden_size=self.shared_ffn_hidden_size
        )
        arguments.one_of(("softmax", "sigmoid"), router=self.router)
        arguments.one_of(("aux", "seq_aux", "global_aux", "bias", "none"), balancing=self.balancing)
        arguments.flag(normalize_top_k=self.normalize_top_k, shared_gate=self.shared_gate)
        arguments.number(least=0, aux_weight=self.aux_weight, z_weight=self.z_weight, bias_rate=self.bias_rate)
        factors = {"capacity_factor": self.capacity_factor, "eval_capacity_factor": self.eval_capacity_factor}
        arguments.number(above=0, optional=True, **factors)
        arguments.number(above=0, scale=self.scale)
        numbered = isinstance(self.layers, list | tuple | range) and all(type(number) is int for number in self.layers)
        if self.layers is not None and not numbered:
            raise ValueError(f"Experts(layers={self.layers!r}): use a list of numbers of layers, or None.")
        self._check_groups(arguments)
        if self.top_k > self.num:
            raise ValueError(f"Experts(num={self.num}, top_k={self.top_k}): there are fewer. Use top_k={self.num}.")
        if self.shared_gate and self.shared_ffn_hidden_size is None:
            raise ValueError(
                "Experts(shared_gate=True) needs shared_ffn_hidden_size=..., the layer that it is the gate of."
            )
        if self.balancing == "bias" and self.router != "sigmoid":
            raise ValueError(
                "Experts(balancing='bias') adds biases to scores of each expert by itself: use router='sigmoid', or"
                " another balancing."
            )
        if self.router == "softmax" and self.top_k == 1 and self.normalize_top_k:
            raise ValueError(
                "Experts(top_k=1): with normalize_top_k=True the weight of the one expert is always 1, and the router"
                " gets no gradient of the loss. Use normalize_top_k=False."
            )
        if self.router == "sigmoid" and (self.top_k == 1) == self.normalize_top_k:
            right = self.top_k > 1
            raise ValueError(
                f"Experts(router='sigmoid', top_k={self.top_k}, normalize_top_k={self.normalize_top_k}): megatron-core"
                f" has sigmoid scores {'normalised only' if right else 'as they are'} there. Use"
                f" normalize_top_k={right}."
            )

    def _check_groups(self, arguments: Arguments) -> None:
        """Refuse groups that do not divide the experts, or have too few of them."""
        arguments.whole(optional=True, groups=self.groups, top_k_groups=self.top_k_groups)
        arguments.whole(group_scores=self.group_scores)
        if (self.groups is None) != (self.top_k_groups is None):
            raise ValueError(
                f"Experts(groups={self.groups}, top_k_groups={self.top_k_groups}): give both, or none of them."
            )
        if self.groups is None or self.top_k_groups is None:
            return
        if self.num % self.groups:
            raise ValueError(f"Experts(num={self.num}, groups={self.groups}): groups are of one size. Use a divisor.")
        size = self.num // self.groups
        if self.top_k_groups > self.groups or self.top_k > self.top_k_groups * size or self.group_scores > size:
            raise ValueError(
                f"Experts(num={self.num}, groups={self.groups}, top_k_groups={self.top_k_groups}, top_k={self.top_k},"
                f" group_scores={self.group_scores}): a group has {size} experts. Use top_k_groups up to {self.groups},"
                f" top_k up to {min(self.top_k_groups, self.groups) * size}, and group_scores up to {size}."
            )

    @property
    def has_losses(self) -> bool:
        """Whether the router has losses of its own."""
        return bool(self.z_weight or (self.balancing.endswith("aux") and self.aux_weight))

    def in_layers(self, num_layers: int) -> list[bool]:
        """For each of the model's layers, whether it has experts.

        Raises:
            ValueError: ``layers`` names one that the model does not have.
        """
        if self.layers is None:
            return [True] * num_layers
        wrong = [number for number in self.layers if not 0 <= number < num_layers]
        if wrong or not self.layers:
            what = f"there is no layer {wrong[0]}" if wrong else "it names no layer"
            raise ValueError(
                f"Experts(layers={self.layers}): {what}; num_layers={num_layers} are numbered from 0. Leave it out for"
                " all layers."
            )
        return [number in self.layers for number in range(num_layers)]

    def sizes(self, ffn_hidden_size: int) -> dict[str, int | None]:
        """What a layout has to divide, as ``check_model`` names it, in a model of that feed-forward width."""
        width = self.ffn_hidden_size or ffn_hidden_size
        return {"num": self.num, "ffn_hidden_size": width, "shared_ffn_hidden_size": self.shared_ffn_hidden_size}

    def megatron_arguments(self, num_layers: int, ffn_hidden_size: int) -> dict[str, Any]:
        """megatron-core's settings; those of balancing stay here, since ``ExpertRouter`` reads this object itself."""
        return {
            "num_moe_experts": self.num,
            "moe_router_topk": self.top_k,
            "moe_ffn_hidden_size": self.ffn_hidden_size or ffn_hidden_size,
            "moe_shared_expert_intermediate_size": self.shared_ffn_hidden_size,
            "moe_shared_expert_gate": self.shared_gate,
            "moe_router_score_function": self.router,
            "moe_router_topk_scaling_factor": None if self.scale == 1.0 else self.scale,
            "moe_router_pre_softmax": self.router == "softmax" and not self.normalize_top_k,
            "moe_router_load_balancing_type": "none",
            # ``ExpertRouter`` drops; megatron-core's dispatchers ask only whether tokens may have been dropped.
            "moe_expert_capacity_factor": self.capacity_factor or self.eval_capacity_factor,
            "moe_pad_expert_input_to_capacity": False,
            "moe_router_dtype": "fp32",
            "moe_layer_freq": [int(has) for has in self.in_layers(num_layers)],
        }


def refuse_own_fields(of: str, extra: Mapping[str, Any], experts: Experts | None) -> None:
    """Refuse fields of megatron-core's configuration that are arguments of ``Experts``, or would change nothing.

    Raises:
        ValueError: Says which argument it is, or what to use.
    """
    if extra.get("moe_pad_expert_input_to_capacity"):  # the dispatcher would drop where the router does not
        raise ValueError(
            f"{of}(extra={{'moe_pad_expert_input_to_capacity': True}}): experts take any number of tokens here, and"
            " padding changes no number. Leave it out."
        )
    for name, value in extra.items():
        is_of_experts = name.startswith("moe_") or name in _OWN_FIELDS or name in _NOT_READ
        if not is_of_experts or value in (None, False):
            continue
        told = f"{of}(extra={{{name!r}: {value!r}}})"
        if experts is None:
            raise ValueError(f"{told} is of mixtures of experts, and here is none. Use {of}(experts=Experts(num=...)).")
        if name in _OWN_FIELDS:
            raise ValueError(f"{of}(extra={{{name!r}: ...}}): use {of}(experts=Experts({_OWN_FIELDS[name]}=...)).")
        if name in _NOT_READ:
            raise ValueError(f"{told}: {_NOT_READ[name]}.")
