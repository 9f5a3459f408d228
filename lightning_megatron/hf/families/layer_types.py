"""Translates a configuration's list of layers with and without an attention window."""

from __future__ import annotations

from typing import Any

from lightning_megatron.hf.config_reader import Fields

_WINDOW, _FULL = "sliding_attention", "full_attention"


def read(fields: Fields) -> dict[str, Any]:
    """Arguments of ``GPTConfig``: the window, and the layers that have it."""
    kinds = fields("layer_types")
    for name in ("use_sliding_window", "max_window_layers"):
        if hasattr(fields.config, name):
            fields(name)  # transformers has put both into `layer_types`
    window = fields("sliding_window")
    layers = [number for number, kind in enumerate(kinds) if kind == _WINDOW]
    if not layers:
        return {}
    return {"sliding_window": window, "sliding_window_layers": None if len(layers) == len(kinds) else layers}


def written(config: Any, switch: bool = True) -> dict[str, Any]:
    """Their fields of a ``GPTConfig``; with ``switch`` there is one that says whether any layer has a window."""
    if config.sliding_window is None:
        return {**({"use_sliding_window": False} if switch else {}), "layer_types": [_FULL] * config.num_layers}
    layers = range(config.num_layers) if config.sliding_window_layers is None else config.sliding_window_layers
    return {
        **({"use_sliding_window": True} if switch else {}),
        "sliding_window": config.sliding_window,
        "layer_types": [_WINDOW if number in layers else _FULL for number in range(config.num_layers)],
    }
