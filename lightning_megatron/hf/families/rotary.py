"""Rotary positions, which several families' configurations describe alike."""

from __future__ import annotations

from typing import Any

from lightning_megatron.hf.fields import Fields, UnsupportedConfigError
from lightning_megatron.layers import ROPE_TYPES

_KINDS = ("default", *ROPE_TYPES)


def read(fields: Fields) -> dict[str, Any]:
    """Arguments of ``GPTConfig`` for their ``rope_parameters``.

    Raises:
        UnsupportedConfigError: Frequencies that change with the length of the input.
    """
    given = dict(fields("rope_parameters"))
    kind = given.get("rope_type", "default")
    if kind not in _KINDS:
        raise UnsupportedConfigError(
            f"{fields.model_type}: the configuration has rope_type={kind!r}, for which there is no counterpart here;"
            f" use one of {', '.join(_KINDS)}."
        )
    base, share = given.pop("rope_theta"), given.pop("partial_rotary_factor", 1.0)
    scaling = None if kind == "default" else given
    return {"position_embedding": "rope", "rotary_base": base, "rotary_percent": share, "rope_scaling": scaling}


def written(config: Any) -> dict[str, Any]:
    """Their ``rope_parameters`` of a ``GPTConfig``."""
    return {
        "rope_type": "default",
        **(config.rope_scaling or {}),
        "rope_theta": float(config.rotary_base),
        **({} if config.rotary_percent == 1.0 else {"partial_rotary_factor": config.rotary_percent}),
    }
