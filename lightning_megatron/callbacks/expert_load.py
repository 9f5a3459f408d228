"""``ExpertLoad``: what the routers of a mixture of experts did in a step, as values to log and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_megatron.callbacks import plots
from lightning_megatron.distributed import collectives
from lightning_megatron.models.gpt.experts.router import ExpertRouter

_MOST_NUMBERS = 400  # in a picture; of more experts the colours alone are shown
_TINY = 1e-30


@dataclass(frozen=True)
class LayerLoad:
    """What the router of one layer did in a step, over all ranks.

    Args:
        layer: Number of the layer, from 0.
        tokens: The tokens that each expert was chosen for, of those that count in the loss.
        aux_loss: The loss that balances the experts, without its weight; 1 where they are equally busy. None: there is
            no such loss.
        z_loss: The mean of the squared logarithm of the sum of exponentials of a token's logits, without its weight.
        entropy: The mean entropy of a token's scores, in nats: 0 where one expert has them all, ``log(num)`` at most.
        dropped: The share of choices that went beyond an expert's capacity.
    """

    layer: int
    tokens: tuple[float, ...]
    aux_loss: float | None
    z_loss: float
    entropy: float
    dropped: float

    @property
    def relative(self) -> list[float]:
        """Each expert's tokens as a multiple of an equal share."""
        share = max(sum(self.tokens) / len(self.tokens), _TINY)
        return [tokens / share for tokens in self.tokens]

    def values(self) -> dict[str, float]:
        """What is logged of the layer."""
        found = {
            "z_loss": self.z_loss,
            "entropy": self.entropy,
            "dropped": self.dropped,
            "max_load": max(self.relative),
            "min_load": min(self.relative),
        }
        return found if self.aux_loss is None else {"aux_loss": self.aux_loss, **found}


@dataclass(frozen=True)
class ExpertLoad:
    """The layers of a model that have experts, and what their routers did in a step; the same on every rank.

    Args:
        layers: The layers, from the first.
        step: Number of the optimizer step.
    """

    layers: tuple[LayerLoad, ...]
    step: int

    def values(self, each_layer: bool) -> dict[str, float]:
        """Means over the layers, of ``max_load`` the largest and of ``min_load`` the smallest; and those of each layer.

        Args:
            each_layer: Whether the values of each layer, and the tokens of each of its experts, are among them.
        """
        every = [layer.values() for layer in self.layers]
        chosen = {"max_load": max, "min_load": min}
        found = {}
        for name in every[0]:
            column = [values[name] for values in every]
            found[f"experts/{name}"] = chosen[name](column) if name in chosen else sum(column) / len(column)
        for layer, values in zip(self.layers, every, strict=True) if each_layer else ():
            found |= {f"experts/layer_{layer.layer}/{name}": value for name, value in values.items()}
            found |= {f"experts/layer_{layer.layer}/tokens_{n}": tokens for n, tokens in enumerate(layer.tokens)}
        return found

    def draw(self, path: str | Path) -> Path:
        """Draw a row for each layer and a column for each expert, coloured by its tokens over an equal share.

        Args:
            path: File of the picture; its ending says the format.
        """
        plt = plots.pyplot("A picture of the experts' load")
        from matplotlib.colors import TwoSlopeNorm

        rows = [layer.relative for layer in self.layers]
        count, most = len(rows[0]), max(max(row) for row in rows)
        size = (max(5.0, min(16.0, 1.8 + 0.5 * count)), max(2.4, min(14.0, 1.4 + 0.32 * len(rows))))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        shown = axes.imshow(rows, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, max(2.0, most)))
        for y, row in enumerate(rows if count * len(rows) <= _MOST_NUMBERS else []):
            for x, load in enumerate(row):
                axes.text(x, y, f"{load:.2f}", ha="center", va="center", fontsize=7)
        axes.set_yticks(range(len(rows)), [str(layer.layer) for layer in self.layers])
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(shown, ax=axes, label="tokens over an equal share")
        dropped = sum(layer.dropped for layer in self.layers) / len(rows)
        lost = f", {dropped:.1%} of the choices dropped" if dropped else ""
        axes.set_title(f"step {self.step}: the busiest expert has {most:.2f} times its share{lost}", fontsize=9)
        figure.savefig(path, dpi=130)
        plt.close(figure)
        return Path(path)


def watch(chunks: Iterable[torch.nn.Module]) -> bool:
    """Have the routers add up what is shown; whether any stage has one. All ranks call this."""
    routers = list(_routers(chunks))
    for router in routers:
        router.watched = True
    return collectives.on_any_rank(bool(routers))[0]


def read(chunks: Iterable[torch.nn.Module], step: int) -> ExpertLoad | None:
    """What the routers of all stages did in the window that has ended; None before the first. All ranks call this."""
    own = [(router, router.last_seen.tolist()) for router in _routers(chunks) if router.last_seen is not None]
    found = sum(collectives.gather_from_stages([_layer(router, seen) for router, seen in own]), [])
    return ExpertLoad(tuple(sorted(found, key=lambda load: load.layer)), step) if found else None


def _routers(chunks: Iterable[torch.nn.Module]) -> Iterator[ExpertRouter]:
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, ExpertRouter))


def _layer(router: ExpertRouter, seen: list[float]) -> LayerLoad:
    tokens, (weight, aux_loss, z_loss, entropy, choices, dropped) = (
        seen[: router.num_experts],
        seen[router.num_experts :],
    )
    weight = max(weight, _TINY)
    return LayerLoad(
        layer=router.layer_number - 1,
        tokens=tuple(tokens),
        aux_loss=aux_loss / weight if router.experts.balancing.endswith("aux") else None,
        z_loss=z_loss / weight,
        entropy=entropy / weight,
        dropped=dropped / max(choices, 1.0),
    )
