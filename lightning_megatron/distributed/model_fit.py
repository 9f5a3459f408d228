"""Checks whether a parallel layout can divide a transformer's sizes, and says what to change if it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from lightning_megatron.distributed import pipeline_cut
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.distributed.suggestions import choices, divisors, is_positive_int, nearest, not_positive, use

_LATENT = "LatentAttention."  # begins the names of its sizes


class _Rule(NamedTuple):
    """A model's ``name`` must be a multiple of ``unit``; changing any one of ``changeable`` can satisfy the rule."""

    name: str
    unit: int
    unit_text: str
    changeable: tuple[str, ...]


def check_model(
    layout: ParallelLayout,
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    vocab_size: int | None = None,
    seq_length: int | None = None,
    uneven_stages: bool = False,
    experts: Mapping[str, int | None] | None = None,
    latents: Mapping[str, int | None] | None = None,
) -> None:
    """Check that a transformer can be divided over a layout.

    Args:
        layout: The parallel sizes of the run.
        num_layers: Transformer layers of the whole model.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Inner width of the MLP.
        num_attention_heads: Query heads.
        num_query_groups: Key-value heads.
        vocab_size: Tokens before padding; any positive number, as ``padded_vocab_size`` makes it divisible.
        seq_length: Tokens of a sequence, or None to leave it unchecked.
        uneven_stages: Whether the model itself shares out its layers over the stages, in numbers that may differ.
        experts: The sizes of a mixture of experts, as ``Experts`` names them; None without one.
        latents: Sizes of multi-latent attention that ``tp`` divides, as ``LatentAttention`` names them.

    Raises:
        LayoutError: A rule is broken; the message has a line for each such rule.
    """
    sizes = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups,
        "vocab_size": vocab_size,
        "seq_length": seq_length,
        **{f"Experts.{name}": size for name, size in (experts or {}).items()},
        **{f"{_LATENT}{name}": size for name, size in (latents or {}).items()},
    }
    model = {name: size for name, size in sizes.items() if size is not None}
    lines = [not_positive(name, size) for name, size in model.items() if not is_positive_int(size)]
    lines = lines or _lines(layout, model, uneven_stages)
    cut = layout.layers_per_stage
    if isinstance(cut, tuple) and not uneven_stages and sum(cut) != num_layers:
        use_even = f" Use {even} for instance." if (even := _even_cut(layout, num_layers)) else ""
        lines.append(f"layers_per_stage={list(cut)} has {sum(cut)} layers, and num_layers={num_layers}.{use_even}")
    if experts is None and (layout.ep > 1 or layout.etp not in (None, layout.tp)):
        lines.append("ep and etp divide experts, and this model has none. Use ep=1 and etp=None.")
    if lines:
        raise layout.error("the model does not fit.\n  " + "\n  ".join(lines))


def _broken_rules(layout: ParallelLayout, model: Mapping[str, int], uneven_stages: bool) -> list[_Rule]:
    """List the rules that ``model`` breaks.

    Sources: ``TransformerConfig.__post_init__`` and ``Attention.__init__`` (heads and query groups),
    ``ColumnParallelLinear`` and ``RowParallelLinear`` (widths), ``scatter_to_sequence_parallel_region`` (sequence), all
    of megatron-core 0.16.1; for context parallelism, rows are padded. One rule is stricter than Megatron,
    which also takes ``tp`` as a multiple of the query groups and then gathers QKV over the tensor-parallel ranks.
    """
    tp, heads, groups = layout.tp, model["num_attention_heads"], model["num_query_groups"]
    rules = [
        _Rule("hidden_size", tp, f"tp={tp}", ("hidden_size", "tp")),
        _Rule("ffn_hidden_size", tp, f"tp={tp}", ("ffn_hidden_size", "tp")),
        _Rule("num_attention_heads", tp, f"tp={tp}", ("num_attention_heads", "tp")),
        _Rule("hidden_size", heads, f"num_attention_heads={heads}", ("hidden_size", "num_attention_heads")),
    ]
    if groups != heads:
        changeable = ("num_attention_heads", "num_query_groups")
        rules.append(_Rule("num_query_groups", tp, f"tp={tp}", ("num_query_groups", "tp")))
        rules.append(_Rule("num_attention_heads", groups, f"num_query_groups={groups}", changeable))
    if not uneven_stages and layout.layers_per_stage is None:
        text = f"pp={layout.pp}" if layout.vp is None else f"pp={layout.pp} × vp={layout.vp}"
        rules.append(_Rule("num_layers", layout.num_stages, text, ("num_layers", "pp")))
    if "seq_length" in model and layout.uses_sequence_parallel:
        rules.append(_Rule("seq_length", tp, f"tp={tp} under sequence_parallel", ("seq_length", "tp")))
    rules += _rules_of_experts(layout)
    rules += [_Rule(name, tp, f"tp={tp}", (name, "tp")) for name in model if name.startswith(_LATENT)]
    return [rule for rule in rules if rule.name in model and model[rule.name] % rule.unit]


def _rules_of_experts(layout: ParallelLayout) -> list[_Rule]:
    """``ep`` divides whole experts, ``etp`` each of them, and ``tp`` one that all tokens use, as it does a layer."""
    etp, kind = layout.expert_tp, "tp" if layout.etp is None else "etp"
    width, shared = "Experts.ffn_hidden_size", "Experts.shared_ffn_hidden_size"
    return [
        _Rule("Experts.num", layout.ep, f"ep={layout.ep}", ("Experts.num", "ep")),
        _Rule(width, etp, f"{kind}={etp}", (width, kind)),
        _Rule(shared, layout.tp, f"tp={layout.tp}", (shared, "tp")),
    ]


def _lines(layout: ParallelLayout, model: Mapping[str, int], uneven_stages: bool) -> list[str]:
    """Write one line for each broken rule."""
    broken = _broken_rules(layout, model, uneven_stages)

    def repairs(name: str, size: int) -> bool:
        return len(_broken_rules(layout, _changed(model, name, size), uneven_stages)) < len(broken)

    def fits(kind: str, size: int) -> bool:
        cut = None if kind == "pp" else layout.layers_per_stage
        other = replace(layout, **{kind: size, "layers_per_stage": cut})  # type: ignore[arg-type]
        return not any(kind in rule.changeable for rule in _broken_rules(other, model, uneven_stages))

    def suggested(name: str, rule: _Rule) -> str:
        if name in ("tp", "pp", "ep", "etp"):
            return choices(name, nearest(getattr(layout, name), layout.legal_sizes(name), partial(fits, name)))
        sizes = nearest(model[name], _candidates(model, name, rule), partial(repairs, name))
        return choices(_label(model, name), sizes)

    return [
        f"{_label(model, rule.name)}={model[rule.name]} is not a multiple of {rule.unit_text}. "
        + use(*(suggested(name, rule) for name in rule.changeable), _cut_for(layout, rule, model))
        for rule in broken
    ]


def _cut_for(layout: ParallelLayout, rule: _Rule, model: Mapping[str, int]) -> str:
    """The stages that a number of layers can have although it does not divide."""
    even = _even_cut(layout, model["num_layers"]) if rule.name == "num_layers" else None
    return f"layers_per_stage={even}" if even else ""


def _even_cut(layout: ParallelLayout, num_layers: int) -> list[int] | None:
    """The layers of each stage, as equal as they can be; None where they are too few."""
    if num_layers < layout.num_stages:
        return None
    return pipeline_cut.even(num_layers, layout.num_stages)


def _candidates(model: Mapping[str, int], name: str, rule: _Rule) -> Sequence[int]:
    """List, in rising order, the values of the model's ``name`` that satisfy ``rule``, up to where they repeat."""
    if name != rule.name:
        return divisors(model[rule.name])
    return range(rule.unit, model[name] + rule.unit * (model["hidden_size"] + 1), rule.unit)


def _is_multi_head(model: Mapping[str, int]) -> bool:
    """Whether each query head has its own keys and values, so that both numbers change together."""
    return model["num_attention_heads"] == model["num_query_groups"]


def _changed(model: Mapping[str, int], name: str, size: int) -> dict[str, int]:
    both = name == "num_attention_heads" and _is_multi_head(model)
    return {**model, name: size, **({"num_query_groups": size} if both else {})}


def _label(model: Mapping[str, int], name: str) -> str:
    return f"{name}=num_query_groups" if name == "num_attention_heads" and _is_multi_head(model) else name
