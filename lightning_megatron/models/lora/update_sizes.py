"""How large the low-rank updates of a model are on a rank, and what they keep for the backward pass."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from lightning_megatron import hf
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
    """

    inputs: int
    rows: int
    is_column: bool


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

    def numbers(self, tp: int) -> int:
        """The weights on a tensor-parallel rank: all of ``A`` and a part of ``B``, or the other way round."""
        down, up = len(self.parts) * self.layer.inputs, sum(self.parts)
        return self.rank * (down + up // tp if self.layer.is_column else down // tp + up)

    def copies(self, tp: int) -> int:
        """The numbers of ``A`` and ``B`` of all updates side by side, on a tensor-parallel rank."""
        width = len(self.parts) * self.rank
        inputs = self.layer.inputs // (1 if self.layer.is_column else tp)
        return width * (inputs + self.layer.rows // (tp if self.layer.is_column else 1))


def linear_layers(config: Any) -> dict[str, LinearLayer]:
    """The linear layers of a transformer layer, by megatron-core's names; those of cross-attention, too."""
    heads, hidden = Heads.of(config), config.hidden_size
    width, query = config.ffn_hidden_size or 4 * hidden, heads.query * heads.size
    found = {
        "self_attention.linear_qkv": LinearLayer(hidden, (heads.query + 2 * heads.groups) * heads.size, True),
        "cross_attention.linear_q": LinearLayer(hidden, query, True),
        "cross_attention.linear_kv": LinearLayer(hidden, 2 * query, True),
        "mlp.linear_fc1": LinearLayer(hidden, (2 if config.is_gated else 1) * width, True),
        "mlp.linear_fc2": LinearLayer(width, hidden, False),
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


def updates_of(config: Any, lora: LoRA) -> list[list[dict[str, LayerUpdate]]]:
    """The updates of each layer of each stack, by the linear layer's name."""
    mapping, heads, linears = _mapping_of(config), Heads.of(config), linear_layers(config)
    found = []
    for index, stack in enumerate(config.stacks(config.lengths)):
        kinds = ("self_attention", "cross_attention", "mlp") if len(stack.attention) > 1 else ("self_attention", "mlp")
        layers: list[dict[str, LayerUpdate]] = []
        for number in range(stack.layers):
            layers.append({})
            for name, linear in linears.items():
                whole = f"{config.stack_names[index]}.layers.{number}.{name}.weight"
                mapped = mapping.get(whole, Same(whole))
                chosen = targets_of(mapped, whole, lora) if name.startswith(kinds) else []
                counts: defaultdict[str, int] = defaultdict(int)
                for rows in mapped.rows(linear.rows, heads) if chosen else ():
                    counts[rows.name] += rows.count
                if chosen:
                    layers[-1][name] = LayerUpdate(linear, lora.rank, tuple(counts[each] for each in chosen))
        found.append(layers)
    return found


def _mapping_of(config: Any) -> WeightMapping:
    try:
        return hf.family_for(config).weight_mapping(config)
    except hf.UnsupportedConfigError:
        return {}
