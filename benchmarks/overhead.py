"""Tokens per second of a Trainer with MegatronStrategy against a loop written by hand on megatron-core.

Both sides have the same model, layout, data, schedule, data-parallel wrapper and optimizer. They run in turn in the
same processes, and the script prints the medians of several rounds. ``--costs`` profiles where the Trainer's side
spends its time.
"""

import argparse
import cProfile
import multiprocessing
import os
import pstats
import socket
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from timing import BATCH, CONFIG, QUIET, WARM_UP, Clock, adamw, rows, tell
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import GPTModule, MegatronStrategy, ParallelLayout
from lightning_megatron.distributed.device import model_rng
from lightning_megatron.distributed.process_groups import data_parallel
from lightning_megatron.models.build_settings import BuildSettings
from lightning_megatron.training.gradient_norm import clip_gradients, gradient_norm
from lightning_megatron.training.optimizer_factory import shard_optimizer

LAYOUTS = {"one process": {}, "dp=2": {}, "tp=2": {"tp": 2}, "pp=2": {"pp": 2}}
CLIP, MICRO_BATCH = 1.0, 2


def loader(layout: ParallelLayout, steps: int) -> DataLoader:
    data = rows(BATCH * layout.dp * (steps + WARM_UP))
    replica = layout.coordinates(int(os.environ["RANK"])).dp
    return DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, layout.dp, replica, shuffle=False))


def with_trainer(sizes: dict, steps: int) -> float:
    """Tokens/s of one replica under the Trainer."""
    world = int(os.environ["WORLD_SIZE"])
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=MegatronStrategy(micro_batch_size=MICRO_BATCH, **sizes),
        max_steps=steps + WARM_UP, gradient_clip_val=CLIP, callbacks=[clock], **QUIET,
    )  # fmt: skip
    trainer.fit(GPTModule(CONFIG, optimizer=adamw), loader(trainer.strategy.layout, steps))
    return steps * BATCH * CONFIG.seq_length / clock.seconds


def by_hand(sizes: dict, steps: int) -> float:
    """Tokens/s of one replica in a loop without Lightning; the process groups are those of the other side."""
    layout = ParallelLayout(world_size=dist.get_world_size(), **sizes)
    stage = layout.coordinates(dist.get_rank()).pp
    module = GPTModule(CONFIG)
    module.settings = BuildSettings(layout=layout)
    with model_rng():
        model = module.build_model(stage == 0, stage == layout.pp - 1, None)
    config = model.config
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), model
    )
    ddp.broadcast_params()
    optimizer = shard_optimizer(
        adamw(model.parameters()), SimpleNamespace(chunks=[ddp], config=config), params_dtype=torch.float32,
        distributed=True, initial_loss_scale=1.0, on_nonfinite="ignore",
    ).inner  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads

    def loss(mask, output):
        total, tokens = (output.float() * mask).sum(), mask.sum()
        return total, tokens.int(), {"loss": torch.stack([total.detach(), tokens])}

    def forward(micro_batches, model):
        tokens = next(micro_batches)["input_ids"]
        length = tokens.size(1)
        mask = torch.ones_like(tokens, dtype=torch.float32)
        mask[:, -1] = 0
        output = model(
            input_ids=tokens, position_ids=torch.arange(length).expand_as(tokens), attention_mask=None,
            labels=tokens.roll(-1, 1),
        )  # fmt: skip
        return output, partial(loss, mask)

    run = get_forward_backward_func()
    for number, batch in enumerate(loader(layout, steps)):
        if number == WARM_UP:
            start = time.perf_counter()
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        parts = [{"input_ids": part} for part in batch["input_ids"].split(MICRO_BATCH)]
        seen = run(
            forward_step_func=forward, data_iterator=iter(parts), model=ddp, num_microbatches=len(parts),
            seq_length=CONFIG.seq_length, micro_batch_size=MICRO_BATCH, forward_only=False,
        )  # fmt: skip
        optimizer.prepare_grads()
        clip_gradients(optimizer, CLIP, gradient_norm(optimizer, torch.device("cpu")))
        optimizer.step_with_ready_grads()
        if seen:
            summed = torch.stack([one["loss"] for one in seen]).sum(0)
            dist.all_reduce(summed, group=data_parallel())
            float(summed[0] / summed[1])
    return steps * BATCH * CONFIG.seq_length / (time.perf_counter() - start)


def rank_main(rank: int, world: int, port: int, sizes: dict, title: str, args: argparse.Namespace) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="benchmark",
    )  # fmt: skip
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    sides: dict[str, list[float]] = {"MegatronStrategy": [], "by hand": []}
    for _ in range(args.rounds):
        sides["MegatronStrategy"].append(with_trainer(sizes, args.steps))
        sides["by hand"].append(by_hand(sizes, args.steps))
    if rank == 0:
        tell(title, sides)
    if args.costs:
        costs(sizes, args.steps, rank)


def costs(sizes: dict, steps: int, rank: int) -> None:
    """Print the profiler's time per step in the functions of this package, of Lightning and of megatron-core."""
    profiler = cProfile.Profile()
    profiler.runcall(with_trainer, sizes, steps)
    if rank:
        return
    table = pstats.Stats(profiler).stats
    whole = sum(own for _, _, own, _, _ in table.values())
    print("  time in the functions themselves, without their callees, under the profiler (which slows Python down):")
    for place in ("lightning_megatron/distributed/cpu_patches", "lightning_megatron", "lightning/", "megatron/core"):
        own = sum(row[2] for (file, _, _), row in table.items() if f"/{place}" in file)
        print(f"    {place}: {own / (steps + WARM_UP) * 1e3:.2f} ms a step, {own / whole:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layout", choices=LAYOUTS, help="the layout to run; by default all of them")
    parser.add_argument("--costs", action="store_true", help="profile where the Trainer's side spends its time")
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    for title in [args.layout] if args.layout else LAYOUTS:
        world = 1 if title == "one process" else 2
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        ranks = [
            context.Process(target=rank_main, args=(rank, world, port, LAYOUTS[title], title, args))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main()
