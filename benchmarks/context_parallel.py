"""Measures what a rank keeps for the backward pass under context parallelism, and how long a step takes.

``memory`` trains one step of a small GPT at each length, and prints the bytes that autograd keeps on the first rank, of
the whole model and of one layer's attention alone. ``time`` prints the ratio of the step without context parallelism to
that with it, of processes of one thread each: by the clock, and by the processor time of a rank, which other work does
not lengthen.
"""

import argparse
import statistics

import lightning.pytorch as pl
import torch
from timing import QUIET, WARM_UP, Clock, adamw, on_ranks
from torch.utils.data import DataLoader

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy
from lightning_megatron.models.layers.attention import TorchAttention
from lightning_megatron.training.saved_bytes import SavedBytes

WAYS = ("all_gather", "all_to_all", "ring")


class Meter(Clock):
    """A clock that counts the activations of the first step, and those that the first layer's attention adds."""

    def on_train_start(self, trainer, module):
        super().on_train_start(trainer, module)
        self.start = 0.0  # a clock begins behind the first steps, of which there is one here
        self.saved = SavedBytes(module.parameters())
        self.saved.__enter__()
        attention = next(part for part in module.modules() if isinstance(part, TorchAttention))
        attention.register_forward_pre_hook(self._before)
        attention.register_forward_hook(self._after)
        self.attention = None

    def _before(self, *_):
        self.before = self.saved.now

    def _after(self, *_):
        if self.attention is None:
            self.attention = self.saved.now - self.before

    def on_train_batch_end(self, trainer, module, *rest):
        super().on_train_batch_end(trainer, module, *rest)
        if self.saved is not None:
            self.saved.__exit__()
            self.peak, self.saved = self.saved.peak, None


def config(length: int, hidden: int, layers: int, groups: int) -> GPTConfig:
    return GPTConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=4, num_query_groups=groups, vocab_size=257,
        seq_length=length, position_embedding="rope", normalization="RMSNorm", activation="swiglu", bias=False,
    )  # fmt: skip


def train(rank: int, world: int, way: str | None, model: GPTConfig, steps: int, counts: bool) -> tuple:
    """On a rank: bytes kept in all and by one attention, seconds of a step, and its processor time."""
    clock = Meter() if counts else Clock()
    strategy = MegatronStrategy(cp=world, cp_comm=way)
    total = steps + (0 if counts else WARM_UP)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=total, callbacks=[clock], **QUIET
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.vocab_size, (total, model.seq_length), generator=generator)
    trainer.fit(GPTModule(model, optimizer=adamw), DataLoader([{"input_ids": row} for row in tokens], batch_size=1))
    if counts:
        return clock.peak, clock.attention
    return clock.seconds / steps, statistics.median(clock.processor)


def memory(lengths: list[int], sizes: list[int], hidden: int, groups: int) -> None:
    print("| tokens | cp | cp_comm | MB kept | of one attention, MB | of cp=1 |")
    print("|---|---|---|---|---|---|")
    for length in lengths:
        alone = None
        for world in sizes:
            for way in WAYS if world > 1 else (None,):
                kept, attention = on_ranks(world, train, way, config(length, hidden, 1, groups), 1, True)
                alone = alone or kept
                mb, of_attention = kept / 1e6, attention / 1e6
                print(
                    f"| {length:,} | {world} | {way or ''} | {mb:.1f} | {of_attention:.1f} | {kept / alone:.3f} |",
                    flush=True,
                )


def time(lengths: list[int], hidden: int, groups: int, rounds: int, steps: int) -> None:
    print("| tokens | cp | cp_comm | seconds a step | times as fast | by processor time |")
    print("|---|---|---|---|---|---|")
    for length in lengths:
        model = config(length, hidden, 2, groups)
        sides = {(1, None): [], **{(2, way): [] for way in WAYS}}
        for _ in range(rounds):
            for (world, way), seen in sides.items():
                seen.append(on_ranks(world, train, way, model, steps, False))
        clock, processor = (statistics.median(each) for each in zip(*sides[1, None], strict=True))
        for (world, way), seen in sides.items():
            wall, busy = (statistics.median(each) for each in zip(*seen, strict=True))
            print(
                f"| {length:,} | {world} | {way or ''} | {wall:.2f} | {clock / wall:.2f} | {processor / busy:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a row")
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, help="width of the model, in 4 heads")
    parser.add_argument("--groups", type=int, default=4, help="heads of keys and values")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    if args.what == "memory":
        memory(args.lengths or [4096, 8192, 16384, 32768, 65536], args.cp, args.hidden or 64, args.groups)
    else:
        time(args.lengths or [4096, 16384], args.hidden or 256, args.groups, args.rounds, args.steps)


if __name__ == "__main__":
    main()
