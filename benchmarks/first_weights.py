"""Measures the cost of initial weights that are the same under every layout, for a GPT of 1 billion parameters.

The other side is megatron-core's own method, which draws the part of each rank from random numbers of its own.
"""

import argparse
import statistics
import time

import torch

from lightning_megatron import GPTConfig, GPTModule
from lightning_megatron.models.gpt import module as gpt_module


class MegatronsOwn:
    """Leaves the weights that megatron-core has drawn."""

    def __init__(self, *_, **__):
        pass

    def draw(self, *_):
        pass


SIDES = {"by name": gpt_module.FirstWeights, "megatron-core's own": MegatronsOwn}


def seconds(config: GPTConfig, first_weights: type) -> tuple[float, float]:
    """The seconds for building the model: wall time, and processor time of this process."""
    gpt_module.FirstWeights = first_weights
    clock, own = time.perf_counter(), time.process_time()
    module = GPTModule(config).build()
    spent = time.perf_counter() - clock, time.process_time() - own
    print(f"{sum(p.numel() for p in module.parameters()) / 1e9:.2f} billion parameters: {spent[0]:.1f} s", flush=True)
    return spent


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = GPTConfig(
        num_layers=arguments.layers, hidden_size=2048, num_attention_heads=16, vocab_size=50257, seq_length=1024
    )
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    seconds(GPTConfig(num_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=64, seq_length=16), MegatronsOwn)
    for _ in range(arguments.rounds):
        for name, side in SIDES.items():
            found[name].append(seconds(shape, side))
    for name, values in found.items():
        clock, own = (statistics.median(each) for each in zip(*values, strict=True))
        print(f"{name}: {clock:.1f} s, of processor time {own:.1f} s")
