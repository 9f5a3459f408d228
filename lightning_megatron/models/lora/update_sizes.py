"""How large the low-rank updates of a model are on a rank, and what they keep for the backward pass."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from lightning_megatron import hf
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.hf.weight_mapping import Heads, Same, WeightMapping
from lightning_megatron.models.lora.config import LoRA
from lightning_megatron.models.lora.inject import targets_of


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer that can have updates.

    Args:
        inputs: Columns of the whole weight.
        rows: Rows of it.
        is_column: Whether tensor-parallel ranks share the rows; else the columns.
        experts: How many experts have such a weight each; 0: it is one weight, which all tokens use.
    """

    inputs: int
    rows: int
    is_column: bool
    experts: int = 0

    def on_rank(self, layout: ParallelLayout) -> tuple[int, int, int]:
        """Of a rank: its number of weights, which is 1 but for experts, and the columns and rows of each."""
        parts = layout.expert_tp if self.experts else layout.tp
        count = self.experts // layout.ep if self.experts else 1
        return count, self.inputs // (1 if self.is_column else parts), self.rows // (parts if self.is_column else 1)


@dataclass(frozen=True)
class LayerUpdate:
    """The updates of one linear layer, one for each of transformers' layers that it is made of.

    Args:
        layer: The linear layer.
        rank: Rank of each update.
        parts: Rows of each update's ``B``.
    """

    layer: LinearLayer
    rank: int
    parts: tuple[int, ...]

    def numbers(self, layout: ParallelLayout) -> int:
        """The weights on a rank: all of ``A`` and a part of ``B``, or the other way round, of each expert it has."""
        count, inputs, rows = self.layer.on_rank(layout)
        return count * self.rank * (len(self.parts) * inputs + sum(self.parts) * rows // self.layer.rows)

    def copies(self, layout: ParallelLayout) -> int:
        """The numbers of ``A`` and ``B`` of all updates side by side, on a rank; those of experts are not copied."""
        _, inputs, rows = self.layer.on_rank(layout)
        return 0 if self.layer.experts else len(self.parts) * self.rank * (inputs + rows)


def linear_layers(config: Any, has_experts: bool) -> dict[str, LinearLayer]:
    """The linear layers of a transformer layer, by megatron-core's names; those of cross-attention, too.

    Args:
        config: The configuration.
        has_experts: Whether it is a layer that has experts.
    """
    heads, hidden = Heads.of(config), config.hidden_size
    query = heads.query * heads.size
    found = {
        "self_attention.linear_qkv": LinearLayer(hidden, (heads.query + 2 * heads.groups) * heads.size, True),
        "cross_attention.linear_q": LinearLayer(hidden, query, True),
        "cross_attention.linear_kv": LinearLayer(hidden, 2 * query, True),
        **_feed_forward(config, has_experts),
    }
    latent = getattr(config, "latent_attention", None)
    if latent is not None:
        del found["self_attention.linear_qkv"]
        for name, (inputs, rows) in latent.linear_layers(hidden, config.num_attention_heads).items():
            found[f"self_attention.{name}"] = LinearLayer(inputs, rows, name != "linear_proj")
        return found
    for attention in ("self_attention", "cross_attention"):
        found[f"{attention}.linear_proj"] = LinearLayer(query, hidden, False)
    return found


def _feed_forward(config: Any, has_experts: bool) -> dict[str, LinearLayer]:
    """The linear layers behind attention: a feed-forward layer's, or those of experts."""
    hidden, width = config.hidden_size, config.ffn_hidden_size or 4 * config.hidden_size
    of: dict[str, tuple[int, int]] = {"mlp": (width, 0)}  # by name, the width and the number of experts
    if has_experts:
        experts = config.experts
        of = {"mlp.experts": (experts.ffn_hidden_size or width, experts.num)}
        if experts.shared_ffn_hidden_size:
            of["mlp.shared_experts"] = experts.shared_ffn_hidden_size, 0
    found = {}
    for name, (inner, number) in of.items():
        found[f"{name}.linear_fc1"] = LinearLayer(hidden, (2 if config.is_gated else 1) * inner, True, number)
        found[f"{name}.linear_fc2"] = LinearLayer(inner, hidden, False, number)
    return found


def updates_of(config: Any, lora: LoRA) -> list[list[dict[str, LayerUpdate]]]:
    """The updates of each layer of each stack, by the linear layer's name."""
    mapping, heads, experts = _mapping_of(config), Heads.of(config), getattr(config, "experts", None)
    linears = {has: linear_layers(config, has) for has in ((False,) if experts is None else (False, True))}
    with_experts = [] if experts is None else experts.in_layers(config.num_layers)
    found = []
    for index, stack in enumerate(config.stacks(config.lengths)):
        kinds = ("self_attention", "cross_attention", "mlp") if len(stack.attention) > 1 else ("self_attention", "mlp")
        layers: list[dict[str, LayerUpdate]] = []
        for number in range(stack.layers):
            layers.append({})
            for name, linear in linears[bool(with_experts) and with_experts[number]].items():
                whole = f"{config.stack_names[index]}.layers.{number}.{name}.weight"
                mapped = mapping.get(whole, Same(whole))
                chosen = targets_of(mapped, whole, lora) if name.startswith(kinds) else []
                if linear.experts and chosen:
                    layers[-1][name] = LayerUpdate(linear, lora.rank, (linear.rows,))
                    continue
                counts: defaultdict[str, int] = defaultdict(int)
                for rows in mapped.rows(linear.rows, heads) if chosen else ():
                    counts[rows.name] += rows.count
                if chosen:
                    layers[-1][name] = LayerUpdate(linear, lora.rank, tuple(counts[each] for each in chosen))
        found.append(layers)
    return found


def _mapping_of(config: Any) -> WeightMapping:
    try:
        return hf.family_for(config).names(config)
    except hf.UnsupportedConfigError:
        return {}
