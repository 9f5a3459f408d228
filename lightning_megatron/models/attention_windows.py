"""Attention windows that all layers have, or some: which ones, and megatron-core's fields that say so."""

from __future__ import annotations

from typing import Any


def has_window(config: Any, number: int) -> bool:
    """Whether a layer, by its number from 0, has the window of ``config.sliding_window``."""
    layers = config.sliding_window_layers
    return config.sliding_window is not None and (layers is None or number in layers)


def core_fields(config: Any, back: int, ahead: int) -> dict[str, Any]:
    """megatron-core's: how many tokens back and ahead a query looks, and 1 for each layer that has the window."""
    has = [int(has_window(config, number)) for number in range(config.num_layers)]
    return {"window_size": (back, ahead), "window_attn_skip_freq": has}


def check_layers(config: Any, name: str, needed: str = "", what: str = "") -> None:
    """Refuse a list of layers that there are not, or that lacks what the layers are to have.

    Args:
        config: The configuration.
        name: Its field, a list of numbers from 0, or None.
        needed: The field that a list needs.
        what: What an error says that the needed field is.

    Raises:
        ValueError: The list is wrong.
    """
    layers, kind = getattr(config, name), type(config).__name__
    if layers is None:
        return
    if needed and getattr(config, needed) is None:
        raise ValueError(f"{kind}({name}={layers}) needs {needed}, {what}.")
    wrong = [number for number in layers if not 0 <= number < config.num_layers]
    if wrong:
        raise ValueError(
            f"{kind}({name}={layers}): there is no layer {wrong[0]}; num_layers={config.num_layers} are numbered"
            " from 0."
        )
