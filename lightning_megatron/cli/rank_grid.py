"""Draws the ranks of a layout as a grid: who holds which stage, shard, part of the rows and replica, on which node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_megatron.distributed.layout import Dimension, LayoutError, ParallelLayout

_WIDEST = 40  # ranks in a line of text; of more replicas the first ones are shown
_MOST_NUMBERED = 1024  # ranks with a number in a picture
_GAP = 0.2  # of a rank's width, between the parts of a row in a picture


@dataclass(frozen=True)
class RankGrid:
    """A layout on nodes.

    Args:
        layout: The sizes.
        ranks_per_node: Devices of a machine.

    Raises:
        LayoutError: The nodes do not hold as many ranks.
    """

    layout: ParallelLayout
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or self.layout.world_size % self.ranks_per_node:
            raise LayoutError(
                f"{self.layout.world_size} ranks do not fill nodes of {self.ranks_per_node}. Use a number of ranks for"
                " each node that divides them."
            )

    @classmethod
    def parse(cls, text: str, ranks_per_node: int | None = None) -> RankGrid:
        """Read ``"tp=2,pp=4,world=16"``.

        Args:
            text: Sizes by the strategy's names; ``world`` is the number of ranks, by default those of one replica, or
                of ``dp`` replicas.
            ranks_per_node: Ranks of each node; by default 8, or all ranks if there are fewer.

        Raises:
            LayoutError: A word is no size, or the sizes do not fit one another.
        """
        sizes: dict[str, int] = {}
        for part in text.replace(" ", ",").split(","):
            name, equals, value = part.partition("=")
            if not part:
                continue
            if not equals or not value.isdigit() or name not in ("tp", "pp", "vp", "cp", "ep", "etp", "dp", "world"):
                raise LayoutError(f"{part!r} in {text!r} is no size: use tp=2,pp=4,vp=2,cp=2,dp=2 or world=16.")
            sizes[name] = int(value)
        copies = sizes.pop("dp", 1)
        one = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("cp", 1)
        world = sizes.pop("world", one * copies)
        layout = ParallelLayout(world_size=world, **sizes)  # type: ignore[arg-type]
        if copies not in (1, layout.dp):
            raise LayoutError(
                f"{text!r}: {world} ranks are dp={layout.dp} replicas of {one}, not {copies}. Leave dp out."
            )
        return cls(layout, ranks_per_node or min(world, 8))

    def node(self, rank: int) -> int:
        """The machine that the rank is on."""
        return rank // self.ranks_per_node

    @property
    def nodes(self) -> int:
        """The number of machines that the ranks are on."""
        return self.layout.world_size // self.ranks_per_node

    def ranks(self, stage: int, replica: int) -> list[list[int]]:
        """The ranks of a pipeline stage in a replica: for each part of a row, those that share its layers."""
        first = self.layout.group("dp", self.layout.group("pp", 0)[stage])[replica]
        return [self.layout.group("tp", part) for part in self.layout.group("cp", first)]

    def warnings(self) -> Iterator[str]:
        """Warnings about what makes this layout slow."""
        each, layout = self.ranks_per_node, self.layout
        if across := self._across_nodes("tp"):
            yield (
                f"tensor parallelism crosses nodes: ranks {across} are on nodes {self._nodes(across)}. Each layer waits"
                f" for the network between them; keep tp at {each} or below, a divisor of it, and use more pipeline"
                " stages (pp)."
            )
        elif across := self._across_nodes("cp"):
            smaller = "a smaller tp, so that tp · cp" if layout.tp > 1 and layout.cp <= each else "a smaller cp, which"
            yield (
                f"context parallelism crosses nodes: ranks {across} are on nodes {self._nodes(across)}. Each layer"
                f" sends keys and values through the network between them; use {smaller} divides {each}, or"
                " recompute='full'. Where it has to cross, cp_comm='ring' sends while it computes."
            )
        if layout.ep > 1 and each % (layout.expert_tp * layout.ep):
            yield (
                f"expert parallelism crosses nodes: etp={layout.expert_tp} × ep={layout.ep} ranks do not divide the"
                f" {each} of a node. Each layer of experts sends all tokens through the network between them; use a"
                f" smaller ep, so that ep · etp divides {each}, where its experts fit."
            )

    def _across_nodes(self, kind: Dimension) -> list[int]:
        """The first group of ranks of a dimension that is on several nodes, or none."""
        groups = (self.layout.group(kind, rank) for rank in range(self.layout.world_size))
        return next((group for group in groups if self.node(group[0]) != self.node(group[-1])), [])

    def _nodes(self, ranks: list[int]) -> str:
        return " and ".join(str(node) for node in sorted({self.node(ranks[0]), self.node(ranks[-1])}))

    def text(self) -> str:
        """The grid, a line for each pipeline stage."""
        layout, digits = self.layout, len(str(self.layout.world_size - 1))
        columns = layout.tp * layout.cp
        shown = max(1, min(layout.dp, _WIDEST // columns))
        nodes = f"{self.nodes} {'node' if self.nodes == 1 else 'nodes'} of {self.ranks_per_node}"
        lines = [f"{layout.world_size} ranks on {nodes}: {layout.sizes}", ""]
        width = columns * (digits + 1) + 2 * (layout.cp - 1) + 11
        left = max(len(self._stage(stage)) for stage in range(layout.pp)) + 2
        lines.append(" " * left + "".join(f"replica {replica}".ljust(width) for replica in range(shown)).rstrip())
        for stage in range(layout.pp):
            parts = []
            for replica in range(shown):
                ranks = self.ranks(stage, replica)
                numbers = " | ".join(" ".join(str(rank).rjust(digits) for rank in part) for part in ranks)
                parts.append(f"{numbers}  {self._where(sum(ranks, []))}".ljust(width))
            more = f" and {layout.dp - shown} replicas more" if shown < layout.dp else ""
            lines.append((self._stage(stage).ljust(left) + "".join(parts)).rstrip() + more)
        if layout.experts_are_divided:
            lines += ["", self._experts()]
        if layout.cp > 1:
            lines += [
                "",
                f"Each row of tokens is in {layout.cp} parts, with | between their ranks, which hold equal weights.",
            ]
        return "\n".join(lines)

    def _experts(self) -> str:
        """Which ranks of the first stage hold all experts of a layer together."""
        layout = self.layout
        each = layout.expert_tp * layout.ep
        copies = [f"{first} to {first + each - 1}" for first in range(0, layout.expert_dp * each, each)]
        more = f" and {len(copies) - 4} copies more" if len(copies) > 4 else ""
        return (
            f"The experts of a layer are divided over {each} ranks (ep={layout.ep}, etp={layout.expert_tp}), on the"
            f" first stage {', '.join(copies[:4])}{more}."
        )

    def draw(self, path: str | Path) -> Path:
        """Write the grid as a picture, a colour for each node."""
        from lightning_megatron.callbacks import plots  # which imports Lightning

        pyplot = plots.pyplot("The rank grid")
        from matplotlib.patches import Rectangle

        layout = self.layout
        replica = layout.cp * (layout.tp + _GAP) - _GAP  # width
        columns = layout.dp * (replica + 0.5)
        size = max(0.28, min(0.7, 40 / columns))
        figure, axes = pyplot.subplots(
            figsize=(size * columns + 2.4, size * layout.pp * 1.15 + 1.6), layout="constrained"
        )
        colours: Any = pyplot.get_cmap("tab20" if self.nodes > 10 else "tab10")
        for rank in range(layout.world_size):
            at = layout.coordinates(rank)
            x, y = at.dp * (replica + 0.5) + at.cp * (layout.tp + _GAP) + at.tp, layout.pp - 1 - at.pp
            axes.add_patch(Rectangle((x, y), 0.94, 0.9, color=colours(self.node(rank) % colours.N), alpha=0.75))
            if layout.world_size <= _MOST_NUMBERED:
                axes.text(x + 0.47, y + 0.45, str(rank), ha="center", va="center", fontsize=max(5, 12 * size))
        axes.set_xlim(-0.2, columns)
        axes.set_ylim(-0.1, layout.pp + 0.1)
        axes.set_xticks([number * (replica + 0.5) + replica / 2 for number in range(layout.dp)])
        names = [f"replica {number}" for number in range(layout.dp)]
        axes.set_xticklabels(names, rotation=45 if layout.dp > 8 else 0)
        axes.set_yticks([layout.pp - 1 - stage + 0.45 for stage in range(layout.pp)])
        axes.set_yticklabels([self._stage(stage) for stage in range(layout.pp)])
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        shown = range(min(self.nodes, 16))
        handles = [Rectangle((0, 0), 1, 1, color=colours(n % colours.N), alpha=0.75, label=f"node {n}") for n in shown]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        beside = "tensor-parallel ranks of a replica" + (", with a gap between parts of its rows" * (layout.cp > 1))
        axes.set_title(f"{self.text().partition(chr(10))[0]}\nside by side: {beside}", fontsize=9)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        return Path(path)

    def _stage(self, stage: int) -> str:
        """Its virtual stages, and how many layers these have where the layout says so."""
        layout = self.layout
        numbers = range(stage, layout.num_stages, layout.pp)
        name = f"stage {stage}" if layout.vp is None else "stages " + ", ".join(map(str, numbers))
        cut = layout.layers_per_stage
        if not isinstance(cut, tuple):
            return name
        one = len(numbers) == 1 and cut[stage] == 1
        return f"{name} ({' + '.join(str(cut[number]) for number in numbers)} {'layer' if one else 'layers'})"

    def _where(self, ranks: list[int]) -> str:
        first, last = self.node(ranks[0]), self.node(ranks[-1])
        return f"node {first}" if first == last else f"nodes {first}-{last}"
