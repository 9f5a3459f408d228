"""Reads how many layers each pipeline stage has, from a list, or from what megatron-core says in its own words.

Stages are numbered through the virtual stages, as in ``ParallelLayout.num_stages``: stage ``i`` is chunk ``i // pp`` of
pipeline rank ``i % pp``. The embedding is on the first of them, the output layer and the loss on the last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Cut = tuple[int, ...] | Literal["auto"] | None
# What each name of a layer is in megatron-core's text of a layout.
_LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
_ROUNDED = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
_WHOLE = "pipeline_model_parallel_layout"
# megatron-core's fields that say how layers are cut into stages.
CORE_FIELDS = (*_ROUNDED, *_COUNTED, _WHOLE)


def read(given: object, pp: int, vp: int | None) -> Cut:
    """The layers of each stage, "auto", or None where all stages have as many.

    Args:
        given: Numbers of layers of the stages, or with ``vp`` of the pipeline ranks; "auto"; or megatron-core's text.
        pp: Pipeline ranks.
        vp: Model chunks of each, or None for one.

    Raises:
        ValueError: It is none of these, or has another number of stages.
    """
    if given is None:
        return None
    if given == "auto":
        return "auto" if pp > 1 else None  # one stage has all layers
    if isinstance(given, str):
        counts = _of_text(given)
    elif isinstance(given, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in given):
        counts = list(given)
    else:
        raise ValueError(
            f"layers_per_stage={given!r}: use a list with the number of layers of each stage, 'auto', or"
            " megatron-core's text, such as 'Ettt|tttL'."
        )
    return _of_all_stages(counts, given, pp, vp)


def number_of_stages(text: str) -> int:
    """The number of virtual stages that megatron-core's text has.

    Raises:
        ValueError: It is no such text.
    """
    return len(_of_text(text))


def later_layers(text: str) -> int | None:
    """The layers of multi-token prediction that megatron-core's text has; None if it names none.

    Raises:
        ValueError: It is no such text.
    """
    return _flat(text).count("m") or None


def even(num_layers: int, stages: int) -> list[int]:
    """The layers of each stage, as equal as they can be; the first stages have one more."""
    return [num_layers // stages + (number < num_layers % stages) for number in range(stages)]


def core_layout(counts: Sequence[int], further: int = 0) -> list[list[str]]:
    """megatron-core's ``pipeline_model_parallel_layout`` of the stages.

    It begins with the embedding and ends with the loss, whether these are the model's or another stack's.

    Args:
        counts: The layers of each stage.
        further: Layers of multi-token prediction, on the last stage.
    """
    stages = [["decoder"] * count for count in counts]
    stages[0].insert(0, "embedding")
    stages[-1] += ["mtp"] * further + ["loss"]
    return stages


def of_core_fields(fields: Mapping[str, Any], num_layers: int, pp: int, vp: int | None) -> Cut:
    """What megatron-core's own fields say of the stages; None if they say nothing.

    Args:
        fields: Fields of ``TransformerConfig``, those of ``CORE_FIELDS`` among others.
        num_layers: Layers of the model.
        pp: Pipeline ranks.
        vp: Model chunks of each, or None for one.

    Raises:
        ValueError: The fields contradict each other, or do not fit the layers.
    """
    said = {name: value for name in CORE_FIELDS if (value := fields.get(name)) not in (None, False)}
    if not said:
        return None
    told = ", ".join(f"{name}={value!r}" for name, value in said.items())
    kinds = [kind for kind in (_ROUNDED, _COUNTED, (_WHOLE,)) if any(name in said for name in kind)]
    if len(kinds) > 1:
        raise ValueError(f"{told}: these say it twice. Use MegatronStrategy(layers_per_stage=[...]) in their place.")
    if _WHOLE in said:
        return read(as_text(said[_WHOLE]), pp, vp)
    chunks = vp or 1
    if kinds == [_COUNTED]:
        each, rest = divmod(num_layers + len(said), pp * chunks)
        counts = [each] * (pp * chunks)
        counts[0] -= _COUNTED[0] in said
        counts[-1] -= _COUNTED[1] in said
    else:
        ends = {place: said[name] for name, place in zip(_ROUNDED, (0, pp - 1), strict=True) if name in said}
        between = pp - len(ends)
        each, rest = divmod(num_layers - sum(ends.values()), between * chunks) if between > 0 else (0, 0)
        ranks = [ends.get(rank, each * chunks) for rank in range(pp)]
        rest += sum(count % chunks for count in ranks)
        counts = [count // chunks for count in ranks] * chunks
    if rest or sum(counts) != num_layers or min(counts) < 0:
        raise ValueError(
            f"{told}: num_layers={num_layers} cannot be shared out so over {_stages(pp, vp)}. Use"
            " MegatronStrategy(layers_per_stage=[...]), which takes any numbers."
        )
    return _of_all_stages(counts, counts, pp, vp)


def _of_all_stages(counts: list[int], given: object, pp: int, vp: int | None) -> tuple[int, ...]:
    """The layers of each virtual stage; those of a pipeline rank are shared out equally over its chunks."""
    stages, told = pp * (vp or 1), f"layers_per_stage={given!r}"
    if vp is not None and len(counts) == pp:
        if odd := [count for count in counts if count % vp]:
            raise ValueError(
                f"{told}: {odd[0]} layers are no multiple of vp={vp}. Give the {stages} numbers of all virtual stages,"
                f" in the order of the layers: {even(sum(counts), stages)} for instance."
            )
        counts = [count // vp for count in counts] * vp
    if len(counts) != stages:
        more = f", or {pp} multiples of vp" if vp is not None else ""
        raise ValueError(
            f"{told} has {len(counts)} {'stage' if len(counts) == 1 else 'stages'}, and {_stages(pp, vp)} need {stages}"
            f" numbers{more}. Use {even(sum(counts), stages)} for instance."
        )
    if not all(counts[1:-1]) or not sum(counts):
        raise ValueError(
            f"{told}: a stage without layers does nothing, unless it is the first, which has the embedding, or the"
            " last, which has the output layer and the loss. Use 1 or more on the others."
        )
    return tuple(counts)


def _of_text(text: str) -> list[int]:
    """The layers of each stage in megatron-core's text."""
    return [stage.count("t") for stage in _flat(text).split("|")]


def _flat(text: str) -> str:
    """megatron-core's text with ``|`` between stages, in which ``(tt|)*3`` and ``t*3`` are written out."""

    def repeated(found: re.Match[str]) -> str:
        return found[1] * int(found[2])

    flat = re.sub(r"\(([^()]+)\)\*(\d+)", repeated, re.sub(r"[,\s]", "", text))
    flat = re.sub(r"([^()|*\d])\*(\d+)", repeated, flat)
    if not re.fullmatch(r"E[t|]*m*L", flat):
        raise ValueError(
            f"layers_per_stage={text!r}: use a list with the number of layers of each stage, 'auto', or megatron-core's"
            " text, in which E is the embedding, t a layer, m one of multi-token prediction, L the output layer and the"
            " loss: 'E|(tt|)*3L' is [0, 2, 2, 2, 0]. E comes first, L last, and m on the last stage."
        )
    return flat


def as_text(layout: object) -> str:
    """megatron-core's layout as text; as a list, it has the names of each stage's layers."""
    if isinstance(layout, str):
        return layout
    try:
        rows = [[str(getattr(each, "name", each)).strip().lower() for each in row] for row in layout]  # type: ignore[attr-defined]
        return "|".join("".join(_LETTERS[name] for name in row) for row in rows)
    except (TypeError, KeyError):
        raise ValueError(f"{_WHOLE}={layout!r}: use megatron-core's text, such as 'Ettt|tttL'.") from None


def _stages(pp: int, vp: int | None) -> str:
    return f"pp={pp}" if vp is None else f"pp={pp}, vp={vp}"
