"""Shared by the benchmarks: the shape of the model, a clock for a Trainer, ranks, and medians of rounds."""

import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_megatron import GPTConfig

BATCH = 8  # rows of one replica's optimizer step
CONFIG = GPTConfig(
    num_layers=4, hidden_size=256, num_attention_heads=8, vocab_size=257, seq_length=256, activation="gelu_tanh"
)
WARM_UP = 2  # steps before the clock starts
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Clock(pl.Callback):
    """Measures the seconds from the end of the warm-up to the end of training, and the processor time of each step."""

    def on_train_start(self, trainer, module):
        self.processor = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == WARM_UP:
            self.start = time.perf_counter()
        if batch_idx >= WARM_UP:
            self.processor.append(-time.process_time())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx >= WARM_UP:
            self.processor[-1] += time.process_time()

    def on_train_end(self, trainer, module):
        self.seconds = time.perf_counter() - self.start


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    length = CONFIG.seq_length
    return [{"input_ids": torch.randint(CONFIG.vocab_size, (length,), generator=generator)} for _ in range(count)]


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> Any:
    """What ``function(rank, world, *args)`` returns on the first of as many processes of one thread each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_megatron", "lightning.pytorch"])
    told = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    each = [context.Process(target=_rank, args=(rank, world, port, told, function, args)) for rank in range(world)]
    for rank in each:
        rank.start()
    found = told.get(timeout=3600)
    for rank in each:
        rank.join()
    return found


def _rank(rank: int, world: int, port: int, told: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="benchmark",
    )  # fmt: skip
    torch.set_num_threads(1)
    found = function(rank, world, *args)
    if rank == 0:
        told.put(found)


def tell(title: str, sides: dict[str, list[float]]) -> None:
    """Print the tokens per second of the two sides and the ratio of their medians."""
    print(title)
    for name, seen in sides.items():
        print(f"  {name}: {statistics.median(seen):.0f} tokens/s of {', '.join(f'{x:.0f}' for x in seen)}")
    ours, theirs = sides.values()
    print(f"  ratio of medians {statistics.median(ours) / statistics.median(theirs):.3f}", flush=True)
