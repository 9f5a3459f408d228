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
    """Their ``rope_parameters`` of a ``GPTConfig``, or of a ``BertConfig``, which always turns whole heads."""
    share = getattr(config, "rotary_percent", 1.0)
    return {
        "rope_type": "default",
        **(config.rope_scaling or {}),
        "rope_theta": float(config.rotary_base),
        **({} if share == 1.0 else {"partial_rotary_factor": share}),
    }


def read_two(fields: Fields) -> dict[str, Any]:
    """As ``read``, where layers with a window rotate by frequencies of their own, which are not stretched.

    Raises:
        UnsupportedConfigError: As ``read``; or those of the window are stretched.
    """
    given = fields("rope_parameters")
    of_windows = read(fields, False, given["sliding_attention"])
    if of_windows["rope_scaling"] is not None:
        fields.must_be("rope_parameters", {"sliding_attention": {"rope_type": "default"}})
    whole = read(fields, False, given["full_attention"])
    has_windows = "sliding_attention" in fields("layer_types")
    return {**whole, "window_rotary_base": of_windows["rotary_base"] if has_windows else None}


def written_two(config: Any) -> dict[str, Any]:
    """As ``written``, for layers without a window and with one."""
    base = config.rotary_base if config.window_rotary_base is None else config.window_rotary_base
    of_windows = {"rope_type": "default", "rope_theta": float(base)}
    return {"full_attention": written(config), "sliding_attention": of_windows}
