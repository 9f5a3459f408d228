"""Measures tokens per second of two processes of one thread each against one such process, for each layout.

Scaling is weak for data parallelism (each replica has a whole batch), and strong for tensor and pipeline parallelism
(one model and one batch, divided in two). All sides run in turn in each round; ``--out`` draws the ratios of medians.
"""

import argparse
import statistics
from typing import Any

from lightning.pytorch import Trainer
from timing import BATCH, CONFIG, QUIET, WARM_UP, Clock, adamw, on_ranks, rows
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import GPTModule, MegatronStrategy

SIDES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"micro_batch_size": 1}),
    "dp=2": (2, {"micro_batch_size": 1}),
    "tp=2": (2, {"tp": 2, "micro_batch_size": 1}),
    "tp=2, sequence parallel": (2, {"tp": 2, "sequence_parallel": True, "micro_batch_size": 1}),
    "pp=2, 8 micro-batches": (2, {"pp": 2, "micro_batch_size": 1}),
    "pp=2, vp=2, 8 micro-batches": (2, {"pp": 2, "vp": 2, "micro_batch_size": 1}),
    "pp=2, 2 micro-batches": (2, {"pp": 2, "micro_batch_size": 4}),
}


def train(rank: int, world: int, options: dict, steps: int) -> float:
    """On a rank: tokens a second of all ranks."""
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=MegatronStrategy(**options), max_steps=steps + WARM_UP,
        callbacks=[clock], **QUIET,
    )  # fmt: skip
    layout = trainer.strategy.layout
    data = rows(BATCH * layout.dp * (steps + WARM_UP))
    replica = layout.coordinates(rank).dp
    sampler = DistributedSampler(data, layout.dp, replica, shuffle=False)
    trainer.fit(GPTModule(CONFIG, optimizer=adamw), DataLoader(data, batch_size=BATCH, sampler=sampler))
    return steps * BATCH * layout.dp * CONFIG.seq_length / clock.seconds


def draw(ratios: dict[str, float], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names, values = list(ratios)[::-1], list(ratios.values())[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(names) + 1.2), layout="constrained")
    bars = axes.barh(names, values, color=["#b5b5b5" if name == "one" else "#2f6db5" for name in names])
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.axvline(2, color="#d97a1f", linestyle="--", linewidth=1)
    axes.text(2, len(names) - 0.4, "twice", color="#d97a1f", ha="center", va="bottom")
    axes.set_xlim(0, 2.3)
    axes.set_xlabel("tokens a second, of one process with one thread")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", help="file for the picture of the ratios")
    args = parser.parse_args()
    seen: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(args.rounds):
        for name, (world, options) in SIDES.items():
            seen[name].append(on_ranks(world, train, options, args.steps))
    ratios = {name: statistics.median(each) / statistics.median(seen["one"]) for name, each in seen.items()}
    for name, each in seen.items():
        print(f"{name}: {ratios[name]:.2f}; tokens/s {', '.join(f'{value:.0f}' for value in each)}", flush=True)
    if args.out:
        draw(ratios, args.out)


if __name__ == "__main__":
    main()
