"""Chooses the way in which attention reaches the keys of other ranks, and refuses one that cannot compute it."""

from __future__ import annotations

from lightning_megatron.distributed.layout import ContextComm


def chosen(
    asked: str | None,
    *,
    cp: int,
    tp: int,
    heads: int,
    groups: int,
    dropout: float = 0.0,
    biased: bool = False,
    sinks: bool = False,
) -> ContextComm:
    """The way that ``MegatronStrategy(cp_comm=)`` names; None is the one that keeps and sends least.

    That is "all_to_all" where heads and groups divide: each rank then has whole rows of a part of the heads, so that
    the kernels are those of one rank, and whatever a row hides costs all ranks the same. Elsewhere it is "all_gather",
    which takes any heads. "ring" is never chosen: it holds less for a moment, and makes a call of a kernel for each
    pair of chunks.

    Args:
        asked: ``cp_comm``.
        cp: Number of ranks that share a row.
        tp: Number of ranks that share each layer.
        heads: Query heads of the whole model.
        groups: Key-value heads of the whole model.
        dropout: Probability that attention drops a weight.
        biased: Whether attention adds a position bias to the scores.
        sinks: Whether each head has a sink, which needs whole rows.

    Raises:
        ValueError: That way cannot compute this layer; the message has one that can.
    """
    own, groups = heads // tp, max(groups // tp, 1)
    if sinks:
        if asked not in (None, "all_to_all"):
            raise ValueError(
                f"MegatronStrategy(cp_comm={asked!r}) does not know the sinks of attention (attention_sinks=True). Use"
                " cp_comm='all_to_all', or leave it out."
            )
        asked = "all_to_all"
    if asked is None:
        return "all_gather" if own % cp or groups % cp else "all_to_all"
    if asked == "all_to_all" and own % cp:
        each = f"{heads} heads" + (f" / tp={tp} = {own} heads" if tp > 1 else "")
        raise ValueError(
            f"MegatronStrategy(cp_comm='all_to_all') gives each of the cp={cp} ranks a part of the heads, and {each} do"
            " not divide by it. Use cp_comm='all_gather' or 'ring', or another cp."
        )
    if asked == "ring" and (dropout or biased):
        what = f"attention_dropout={dropout}" if dropout else "a relative position bias, as T5 has"
        instead = ", or attention_dropout=0.0" if dropout else ""
        raise ValueError(
            f"MegatronStrategy(cp_comm='ring') has no kernel for {what}. Use cp_comm='all_gather' or"
            f" 'all_to_all'{instead}."
        )
    if asked not in ("all_gather", "all_to_all", "ring"):
        raise ValueError(f"cp_comm={asked!r}: use 'all_gather', 'all_to_all' or 'ring', or None for the best one.")
    return asked  # type: ignore[return-value]
