"""Translates a configuration's rotary positions, which several families describe alike."""

from __future__ import annotations

from typing import Any

from lightning_megatron.hf.config_reader import Fields, UnsupportedConfigError

# Kinds whose frequencies do not depend on the length of the input; ``GPTConfig`` refuses others, too.
_KINDS = ("default", "linear", "llama3", "yarn")


def read(fields: Fields, partial: bool, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of ``GPTConfig`` for their ``rope_parameters``.

    Args:
        fields: transformers' configuration.
        partial: Whether transformers' class turns a part of each head where the configuration says so. Others turn
            all of it, and cannot scale a part.
        given: One of several ``rope_parameters``. None: they are the configuration's.

    Raises:
        UnsupportedConfigError: Frequencies that change with the length of the input, or of a part that is scaled.
    """
    given = dict(fields("rope_parameters") if given is None else given)
    kind = given.get("rope_type", "default")
    if kind not in _KINDS:
        raise UnsupportedConfigError(
            f"{fields.model_type}: the configuration has rope_type={kind!r}, for which there is no counterpart here;"
            f" use one of {', '.join(_KINDS)}."
        )
    base, share = given.pop("rope_theta"), given.pop("partial_rotary_factor", 1.0)
    scaling = None if kind == "default" else given
    if not partial and scaling is not None and share != 1.0:
        raise UnsupportedConfigError(
            f"{fields.model_type}: the configuration has partial_rotary_factor={share} with rope_type={kind!r}, which"
            " transformers' own class cannot compute. Leave partial_rotary_factor out."
        )
    share = share if partial else 1.0
    return {"position_embedding": "rope", "rotary_base": base, "rotary_percent": share, "rope_scaling": scaling}


def written(config: Any) -> dict[str, Any]:
    """Their ``rope_parameters`` of a ``GPTConfig``."""
    return {
        "rope_type": "default",
        **(config.rope_scaling or {}),
        "rope_theta": float(config.rotary_base),
        **({} if config.rotary_percent == 1.0 else {"partial_rotary_factor": config.rotary_percent}),
    }
