"""What context parallelism changes of the memory that a training takes: tokens are shared, keys and values travel."""

from __future__ import annotations

from typing import Any

from lightning_megatron.distributed.layout import ContextComm


def share(stack: Any, cp: int, multiple: int) -> Any:
    """A ``LayerStack`` with a rank's tokens of a padded sequence, and all keys of it.

    Args:
        stack: The stack with the tokens of a whole sequence.
        cp: Number of ranks that share a sequence.
        multiple: What the length of a padded sequence is a multiple of.
    """

    def padded(tokens: int) -> int:
        return -(-tokens // multiple) * multiple

    keys = [(padded(keys), seen) for keys, seen in stack.attention]
    return stack._replace(tokens=padded(stack.tokens) // cp, attention=keys)


def kept_beside(way: ContextComm | None, query: float, key: float, rotated: bool) -> float:
    """Numbers that attention keeps of a layer beside its own queries, keys, values and output; as ``held_at_once``.

    An all-to-all keeps its output by heads, too. An all-gather keeps its output in parts, and a copy of the keys and
    values that it has sent, to send them again in the backward pass; what is not copied or rotated is a part of the
    projection's output, and keeps all of it.

    Args:
        way: How attention reaches across ranks; None: no ranks share a sequence.
        query: Numbers of a rank's queries.
        key: Numbers of a rank's own keys, of which there are as many values.
        rotated: Whether queries and keys are rotated by their positions into tensors of their own.
    """
    if way == "all_to_all":
        return query
    if way == "all_gather":
        return query if rotated else query + 2 * key
    return query + key if rotated else 0.0


def held_at_once(way: ContextComm, cp: int, query: float, key: float) -> float:
    """Numbers that attention holds of other ranks while it computes a layer, and no longer.

    Args:
        way: How attention reaches across ranks.
        cp: Number of ranks that share a sequence.
        query: Numbers of a rank's queries.
        key: Numbers of a rank's own keys, of which there are as many values.
    """
    return {"all_gather": 2 * key * cp, "all_to_all": 2 * query + 2 * key, "ring": 4 * key}[way]
