"""Compares a pipeline whose stages have as many layers with one that ``layers_per_stage="auto"`` has cut.

A pipeline runs at the pace of its slowest stage, and the last stage also has the output layer over the vocabulary.
Each round trains both sides in turn, and takes the processor time of a step on each rank: other work on the machine
does not lengthen it, and a rank that waits for its neighbour uses none.
"""

import argparse
import statistics

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from timing import QUIET, WARM_UP, Clock, adamw, on_ranks
from torch.utils.data import DataLoader

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy
from lightning_megatron.models.layer_times import layer_times
from lightning_megatron.models.pipeline_balance import Balance


def train(rank: int, world: int, config: GPTConfig, cut: str | None, steps: int) -> tuple[list[int], list[float]]:
    """On a rank: the layers of each stage, and the median processor time of a step on each of them."""
    clock, strategy = Clock(), MegatronStrategy(pp=world, layers_per_stage=cut, num_microbatches=4)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=steps + WARM_UP, callbacks=[clock], **QUIET
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (4 * (steps + WARM_UP), config.seq_length), generator=generator)
    trainer.fit(GPTModule(config, optimizer=adamw), DataLoader([{"input_ids": row} for row in tokens], batch_size=4))
    times: list = [None] * world
    dist.all_gather_object(times, statistics.median(clock.processor))
    layers = strategy.layout.layers_per_stage or [config.num_layers // world] * world
    return list(layers), times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print("| vocabulary | cut | layers | ms of processor time a step, each stage | of the slowest, by the estimate |")
    print("|---|---|---|---|---|")
    for vocabulary in given.vocabulary:
        config = GPTConfig(
            num_layers=given.layers, hidden_size=given.hidden, num_attention_heads=8, vocab_size=vocabulary,
            seq_length=256, position_embedding="rope", normalization="RMSNorm", bias=False, tie_embeddings=False,
        )  # fmt: skip
        balance = Balance(layer_times(config, None)[0], given.pp)
        seen: dict[str | None, list[list[float]]] = {None: [], "auto": []}
        layers = {}
        for _ in range(given.rounds):
            for cut, rounds in seen.items():
                layers[cut], times = on_ranks(given.pp, train, config, cut, given.steps)
                rounds.append(times)
        slowest = {}
        for cut, rounds in seen.items():
            each = [statistics.median(times) for times in zip(*rounds, strict=True)]
            slowest[cut] = max(each)
            estimated = balance.stage_times(layers[cut])
            shares = " / ".join(f"{time / max(estimated):.2f}" for time in estimated)
            told = " / ".join(f"{1000 * time:.0f}" for time in each)
            print(f"| {vocabulary:,} | {cut or 'even'} | {layers[cut]} | {told} | {shares} |")
        gain = [max(balance.stage_times(layers[cut])) for cut in (None, "auto")]
        ratios = f"{slowest[None] / slowest['auto']:.3f}, {gain[0] / gain[1]:.3f} by the estimate"
        print(f"The slowest stage, even to auto: {ratios}", flush=True)


if __name__ == "__main__":
    main()
