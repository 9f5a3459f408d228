"""Megatron-LM's settings of a mixture of experts, which are ``Experts`` in a GPT's configuration here."""

from __future__ import annotations

import ast
from typing import Any

from lightning_megatron.cli.migrate.model_settings import depth, is_gpt
from lightning_megatron.cli.migrate.plan import Fate, Given, MigrationError, Plan, take
from lightning_megatron.cli.migrate.settings_table import CONFIG, STRATEGY

_PLACE = f"{CONFIG}.experts"
# Megatron-LM's settings that are one argument of ``Experts`` each.
_ALONE = {
    "num_experts": "num",
    "moe_router_topk": "top_k",
    "moe_ffn_hidden_size": "ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "shared_ffn_hidden_size",
    "moe_shared_expert_gate": "shared_gate",
    "moe_router_score_function": "router",
    "moe_z_loss_coeff": "z_weight",
    "moe_router_bias_update_rate": "bias_rate",
    "moe_router_topk_scaling_factor": "scale",
    "moe_router_num_groups": "groups",
    "moe_router_group_topk": "top_k_groups",
    "moe_expert_capacity_factor": "capacity_factor",
}
# Those that are one together with others, and those of megatron-core that no argument names.
_TOGETHER = (
    "moe_router_pre_softmax",
    "moe_router_load_balancing_type",
    "moe_router_enable_expert_bias",
    "moe_aux_loss_coeff",
    "moe_layer_freq",
    "moe_token_dispatcher_type",
    "moe_router_dtype",
    "moe_pad_expert_input_to_capacity",
)
_EXTRA = (
    "moe_input_jitter_eps",
    "moe_router_force_load_balancing",
    "moe_token_drop_policy",
    "moe_shared_expert_overlap",
)
_BALANCING = {"aux_loss": "aux", "seq_aux_loss": "seq_aux", "global_aux_loss": "global_aux"}


def experts(given: Given, plan: Plan) -> None:
    """Carry over the experts of a GPT; of other models, and of a pretrained one, they are not a setting.

    Args:
        given: All settings, by Megatron's names, with their values read.
        plan: The run in the making.
    """
    if given.get("num_experts") is None or not is_gpt(plan):
        fate: Fate = "not needed"
        says = "Megatron-LM looks at it only with num_experts"
        if given.get("num_experts") is not None:
            fate, says = (
                "not here",
                "only a GPT that is built from its sizes has experts; a pretrained one brings its own",
            )
        take(given, plan, (*_ALONE, *_TOGETHER, *_EXTRA), says, fate=fate)
        return
    settings: dict[str, Any] = {}
    for name, ours in _ALONE.items():
        if given.get(name) is not None:
            settings[ours] = given[name]
            if ours != "top_k_groups":
                plan.say(name, given[name], "carried over", f"Experts({ours}=)", _PLACE)
    top_k = settings.setdefault("top_k", 2)
    if settings.get("top_k_groups"):
        _groups(given, plan, settings, top_k)
    if settings.get("capacity_factor"):
        settings["eval_capacity_factor"] = settings["capacity_factor"]  # megatron-core drops in evaluation, too
    _normalisation(given, plan, settings, top_k)
    _balancing(given, plan, settings)
    _layers(given, plan, settings)
    _kernels(given, plan)
    for name in _EXTRA:
        if given.get(name) is not None:
            plan.put(f"{CONFIG}.extra.{name}", given[name])
            plan.say(name, given[name], "carried over", f"config.extra[{name!r}]")
    if plan.get(f"{CONFIG}.layers") == "transformer_engine":
        plan.take_back(f"{CONFIG}.layers", "not needed", "layers of a mixture are PyTorch's, with the same numbers")
    plan.put(_PLACE, settings)


def _groups(given: Given, plan: Plan, settings: dict[str, Any], top_k: int) -> None:
    """How many scores of a group are added is megatron-core's rule; of which kind they are is not always."""
    settings["group_scores"] = max(1, top_k // settings["top_k_groups"])
    here = "Experts(top_k_groups=)"
    of_logits = settings.get("router") != "sigmoid" and not given.get("moe_router_pre_softmax")
    if of_logits and settings["group_scores"] > 1:
        here += "; Megatron-LM ranks groups by their best logits, and here probabilities are added"
    plan.say("moe_router_group_topk", settings["top_k_groups"], "carried over", here, _PLACE)


def _normalisation(given: Given, plan: Plan, settings: dict[str, Any], top_k: int) -> None:
    """Whether the weights of a token's experts add up to 1: of sigmoid scores, where there are several."""
    name, before = "moe_router_pre_softmax", bool(given.get("moe_router_pre_softmax"))
    sigmoid = settings.get("router") == "sigmoid"
    normalised = top_k > 1 if sigmoid else not before
    if not normalised:
        settings["normalize_top_k"] = False
    if given.get(name) is not None and sigmoid:
        plan.say(name, before, "not needed", "of softmax scores alone")
    elif given.get(name) is not None:
        plan.say(name, before, "carried over", f"Experts(normalize_top_k={normalised})", _PLACE)


def _balancing(given: Given, plan: Plan, settings: dict[str, Any]) -> None:
    """One loss, or biases; Megatron-LM's losses have a weight of 0 where nothing is said."""
    kinds = given.get("moe_router_load_balancing_type") or ["aux_loss"]
    weights = given.get("moe_aux_loss_coeff") or [0.0] * len(kinds)
    if len(weights) != len(kinds):
        raise MigrationError(
            f"moe_aux_loss_coeff={weights}: {len(kinds)} kinds of moe_router_load_balancing_type need as many."
        )
    losses = [(kind, weight) for kind, weight in zip(kinds, weights, strict=True) if kind in _BALANCING and weight]
    biased = bool(given.get("moe_router_enable_expert_bias"))
    if biased:
        settings["balancing"] = "bias"
    elif losses:
        kind, settings["aux_weight"] = losses[0]
        settings["balancing"] = _BALANCING[kind]
    else:
        settings["balancing"] = "none"
    at = f"Experts(balancing={settings['balancing']!r})"
    if given.get("moe_router_enable_expert_bias") is not None:
        plan.say("moe_router_enable_expert_bias", biased, "carried over", at, _PLACE)
    kept = losses[:1] if not biased else []
    for number, kind in enumerate(kinds):
        weight = weights[number]
        for name, value in (("moe_router_load_balancing_type", kind), ("moe_aux_loss_coeff", weight)):
            if given.get(name) is None:
                continue
            if kind not in (*_BALANCING, "none"):
                plan.say(name, value, "not here", f"balancing is one of {', '.join(_BALANCING)}, none, or biases")
            elif (kind, weight) in kept or not weight or kind == "none":
                plan.say(name, value, "carried over", at, _PLACE)
            else:
                plan.say(name, value, "not here", f"beside {at} there is no further loss")


def _layers(given: Given, plan: Plan, settings: dict[str, Any]) -> None:
    """The numbers of the layers that have experts, of every so many, or of a list with a 1 for each of them."""
    written, count = given.get("moe_layer_freq"), depth(given)
    if written is None:
        return
    if count is None:
        plan.say("moe_layer_freq", written, "yours to do", "Experts(layers=): the numbers, from 0, of their layers")
        return
    pattern = _pattern(written)
    has = [number % pattern == 0 for number in range(count)] if isinstance(pattern, int) else [bool(n) for n in pattern]
    if len(has) != count:
        raise MigrationError(
            f"moe_layer_freq={written!r}: it says of {len(has)} layers whether they have experts, of {count}."
        )
    if not all(has):
        settings["layers"] = [number for number, each in enumerate(has) if each]
    plan.say("moe_layer_freq", written, "carried over", "Experts(layers=)", _PLACE)


def _pattern(written: str) -> int | list[int]:
    """A number, or the list that is written as Python's, such as ``([0]*1+[1]*3)*2``."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.List):
            return [value(each) for each in node.elts]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right = value(node.left), value(node.right)
            return left + right if isinstance(node.op, ast.Add) else left * right
        raise ValueError

    try:
        found = value(ast.parse(written.strip(), mode="eval").body)
        if isinstance(found, int) and found < 1:
            raise ValueError
    except (SyntaxError, TypeError, ValueError):
        raise MigrationError(
            f"moe_layer_freq={written!r}: use a number, or a list such as [0]*1+[1]*3 with 1 for layers with experts."
        ) from None
    return found


def _kernels(given: Given, plan: Plan) -> None:
    """How tokens reach their experts, and the type of the router's numbers."""
    way, dtype = given.get("moe_token_dispatcher_type"), given.get("moe_router_dtype")
    padding = given.get("moe_pad_expert_input_to_capacity")
    if padding is not None:
        says = "experts take any number of tokens here, and padding changes no number"
        plan.say("moe_pad_expert_input_to_capacity", padding, "not needed", says)
    if way in ("alltoall", "allgather"):
        place = f"{STRATEGY}.kernels.expert_dispatch"
        plan.put(place, way)
        plan.say("moe_token_dispatcher_type", way, "carried over", f"Kernels(expert_dispatch={way!r})", place)
    elif way is not None:
        plan.say(
            "moe_token_dispatcher_type", way, "not here", "tokens are sent with alltoall, its default, or allgather"
        )
    if dtype is not None:
        fate: Fate = "not needed" if dtype == "fp32" else "not here"
        plan.say("moe_router_dtype", dtype, fate, "a router computes in fp32 here")
