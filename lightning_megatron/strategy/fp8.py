"""Translates the recipes of Transformer Engine, which say how fp8 is scaled, into megatron-core's fields of fp8."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

_FORMATS = {"HYBRID": "hybrid", "E4M3": "e4m3"}
# By the recipe's class: megatron-core 0.16.1's name of it, and the fields that megatron-core hands on, by both names.
_RECIPES: dict[str, tuple[str, dict[str, str]]] = {
    "DelayedScaling": (
        "delayed",
        {
            "margin": "fp8_margin",
            "amax_history_len": "fp8_amax_history_len",
            "amax_compute_algo": "fp8_amax_compute_algo",
            "fp8_dpa": "fp8_dot_product_attention",
            "fp8_mha": "fp8_multi_head_attention",
        },
    ),
    "Float8CurrentScaling": ("tensorwise", {"fp8_dpa": "fp8_dot_product_attention"}),
    "MXFP8BlockScaling": ("mxfp8", {}),
    "Float8BlockScaling": ("blockwise", {}),
}
# Transformer Engine's and Lightning's default, a DelayedScaling().
DEFAULT = {
    "fp8": "hybrid",
    "fp8_recipe": "delayed",
    "fp8_margin": 0,
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
}


def fp8_fields(recipe: Any) -> dict[str, Any]:
    """Translate a recipe into the fields of megatron-core's ``TransformerConfig`` that make megatron-core build it.

    Args:
        recipe: An object of ``transformer_engine.common.recipe``, or None for the default.

    Raises:
        MisconfigurationException: megatron-core has no such recipe, or does not hand a setting of it on.
    """
    if recipe is None:
        return dict(DEFAULT)
    kind = type(recipe).__name__
    if kind not in _RECIPES:
        raise MisconfigurationException(
            f"MegatronStrategy: megatron-core has no fp8 recipe like {kind}. Use one of these of"
            f" transformer_engine.common.recipe: {', '.join(_RECIPES)}."
        )
    name, handed_on = _RECIPES[kind]
    given = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    number_format = getattr(given.pop("fp8_format"), "name", "")
    if number_format not in _FORMATS:
        raise _refused(kind, "fp8_format", number_format, f"Use one of {', '.join(_FORMATS)}.")
    fields: dict[str, Any] = {"fp8": _FORMATS[number_format], "fp8_recipe": name}
    fields |= {ours: given.pop(theirs) for theirs, ours in handed_on.items() if theirs in given}
    if callable(fields.get("fp8_amax_compute_algo")):
        raise _refused(kind, "amax_compute_algo", "a function", "Use 'max' or 'most_recent'.")
    if kind == "DelayedScaling":
        forward, inputs, weights = given.pop("override_linear_precision", (False, False, False))
        if forward or inputs:
            seen = (forward, inputs, weights)
            raise _refused(kind, "override_linear_precision", seen, "Only the last, of weight gradients, may be True.")
        fields["fp8_wgrad"] = not weights
    default = type(recipe)(fp8_format=recipe.fp8_format)
    for left, value in given.items():
        if value != getattr(default, left):
            raise _refused(kind, left, value, "Leave it at its default.")
    return fields


def _refused(kind: str, name: str, value: Any, remedy: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"MegatronStrategy: megatron-core does not hand {kind}({name}={value!r}) on to Transformer Engine. {remedy}"
    )
