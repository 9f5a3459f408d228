"""Trains a part of the truth's run, from one checkpoint to another."""

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import GPTConfig
from tests.reference import parallel_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, Watch
from tests.reference.plain_gpt import Weights
from tests.support.layout import Layout
from tests.support.trainer import trainer

ROWS, STEPS, CLIP = 12, 6, 0.5


def train_part(
    config: GPTConfig,
    layout: Layout,
    steps: int,
    load: Path | None = None,
    save: Path | None = None,
    full: Weights | None = None,
    precision: str = "32-true",
    strategy: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train up to step ``steps``; with the truth's weights in ``full``, the worst distance to them."""
    module, watch = LoadedGPT(config), Watch()
    run = trainer(
        layout, strategy, precision, max_steps=steps, gradient_clip_val=CLIP, callbacks=[watch], max_epochs=-1
    )
    samples = Rows(parallel_gpt.text_samples(config, ROWS * STEPS))
    sampler = DistributedSampler(samples, layout.dp, run.strategy.data_parallel_rank, shuffle=False)
    run.fit(module, DataLoader(samples, batch_size=ROWS // layout.dp, sampler=sampler), ckpt_path=load)
    if save is not None:
        run.save_checkpoint(save)
    distance = 0.0
    for name, parameter in module.named_shards() if full else ():
        wanted = module.shard_of(full, name, parameter)
        rows = config.vocab_size if "word_embeddings" in name or "output_layer" in name else None
        if rows:  # padding is not compared
            first = run.strategy.tensor_parallel_rank * parameter.size(0)
            parameter, wanted = parameter[: max(rows - first, 0)], wanted[: max(rows - first, 0)]
        if parameter.numel():
            distance = max(distance, float((parameter.detach().float() - wanted).abs().max()))
    return {"losses": watch.losses, "norms": watch.norms[-len(watch.losses) :], "distance": distance}
