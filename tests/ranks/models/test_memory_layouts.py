"""``ParallelLayout.memory`` against the states and the saved tensors of real runs on several ranks."""

from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_megatron import (
    BertConfig,
    BertModule,
    Experts,
    GPTConfig,
    GPTModule,
    Kernels,
    LoRA,
    ParallelLayout,
    T5Config,
    T5Module,
)
from lightning_megatron.callbacks.memory import estimate
from lightning_megatron.training.saved_bytes import SavedBytes
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import loader, trainer

SIZES = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256, "seq_length": 32}
GATED = {
    "num_query_groups": 2, "normalization": "RMSNorm", "activation": "swiglu", "bias": False,
    "position_embedding": "rope", "tie_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "gpt": (GPTModule, GPTConfig(**SIZES)),
    "llama": (GPTModule, GPTConfig(**SIZES, **GATED)),
    "mixture": (
        GPTModule,
        GPTConfig(
            **SIZES,
            **GATED,
            experts=Experts(num=4, top_k=2, ffn_hidden_size=96, shared_ffn_hidden_size=32, layers=[1, 2, 3]),
            extra={"moe_router_force_load_balancing": True},  # as the estimate has it
        ),
    ),
    "bert": (BertModule, BertConfig(**SIZES)),
    "t5": (T5Module, T5Config(**{**SIZES, "num_layers": 2})),
}
ROWS, MICRO_BATCHES = 2, 4


class _Meter(Callback):
    """Counts in the second step, when the first one has made the optimizer's state."""

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.saved = SavedBytes(module.parameters())
            self.saved.__enter__()

    def on_train_batch_end(self, run: Any, module: Any, _: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.saved.__exit__()
            self.states = astuple(estimate(run.strategy.engine, run.strategy.optimizers[0]))
            self.stage = run.strategy.layout.coordinates(run.strategy.global_rank).pp


def _measured(
    name: str, layout: Layout, precision: str, recompute: Any, lora: LoRA | None
) -> tuple[int, tuple[int, ...], int]:
    module, config = CONFIGS[name]
    rows = ROWS * MICRO_BATCHES * layout.dp  # of a step
    tokens = torch.randint(5, 256, (2 * rows, 32), generator=torch.Generator().manual_seed(1))
    labels = tokens.masked_fill(torch.arange(32) % 7 != 0, -100) if name == "bert" else tokens
    samples = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    meter = _Meter()
    options = {"num_microbatches": MICRO_BATCHES, "recompute": recompute}
    run = trainer(layout, options, precision, max_steps=2, callbacks=[meter])
    run.fit(module(config, lora=lora), loader(samples, layout, rows, run))
    return meter.stage, meter.states, meter.saved.peak


@pytest.mark.parametrize(
    ("name", "layout", "precision", "recompute"),
    [
        ("gpt", Layout(dp=2), "bf16-mixed", None),
        ("gpt", Layout(tp=2, sp=True), "32-true", None),
        ("gpt", Layout(pp=2), "bf16-mixed", None),
        ("gpt", Layout(pp=2, vp=2), "32-true", "selective"),
        ("llama", Layout(tp=2), "bf16-mixed", "selective"),
        ("llama", Layout(pp=2), "32-true", "full"),
        ("bert", Layout(tp=2, sp=True), "32-true", None),
        ("t5", Layout(pp=2), "32-true", "selective"),
    ],
    ids=str,
)
def test_states_and_activations(name, layout, precision, recompute):
    assert_as_measured(name, layout, precision, recompute)


@pytest.mark.parametrize(
    ("name", "layout", "way"),
    [
        ("gpt", Layout(cp=2), "all_to_all"),
        ("llama", Layout(cp=2), "all_gather"),
        ("llama", Layout(cp=2), "all_to_all"),
        ("llama", Layout(cp=2, tp=2, sp=True), "ring"),
        ("bert", Layout(cp=2), None),
        ("t5", Layout(cp=2, pp=2), "all_gather"),
        ("t5", Layout(cp=2, pp=2), "all_to_all"),
    ],
    ids=str,
)
def test_ranks_that_share_rows(name, layout, way):
    assert_as_measured(name, replace(layout, extra={"cp_comm": way}), "32-true", None, within=0.05)


@pytest.mark.parametrize(
    ("name", "layout", "lora"),
    [
        ("llama", Layout(tp=2, sp=True), LoRA(rank=4)),
        ("gpt", Layout(tp=2), LoRA(rank=4, targets=["c_proj"])),
        ("gpt", Layout(pp=2), LoRA(rank=4, also_train=["embedding"])),
    ],
    ids=str,
)
def test_low_rank_updates(name, layout, lora):
    assert_as_measured(name, layout, "bf16-mixed", None, lora)


@pytest.mark.parametrize(
    ("layout", "dispatch"),
    [
        (Layout(dp=2, ep=2), "alltoall"),
        (Layout(dp=2, ep=2), "allgather"),
        (Layout(tp=2, ep=2, etp=1, sp=True), "alltoall"),
        (Layout(dp=4, etp=2), "alltoall"),
        (Layout(pp=2, dp=2, ep=2), "alltoall"),
    ],
    ids=str,
)
def test_experts(layout, dispatch):
    kernels = Kernels(expert_dispatch=dispatch)
    assert_as_measured("mixture", replace(layout, extra={"kernels": kernels}), "bf16-mixed", "selective")


def assert_as_measured(name, layout, precision, recompute, lora=None, within=0.1) -> None:
    sizes = ParallelLayout(
        world_size=layout.world_size,
        tp=layout.tp,
        pp=layout.pp,
        vp=layout.vp,
        cp=layout.cp,
        ep=layout.ep,
        etp=layout.etp,
        sequence_parallel=layout.sp,
    )
    table = sizes.memory(
        CONFIGS[name][1], micro_batch_size=ROWS, num_microbatches=MICRO_BATCHES, precision=precision,
        recompute=recompute, device="cpu", lora=lora, **layout.extra,
    )  # fmt: skip
    for stage, (weights, gradients, optimizer), kept in run_in_pool(
        layout.world_size, _measured, name, layout, precision, recompute, lora
    ):
        told = table.stages[stage]
        assert told.weights == pytest.approx(weights, rel=0.05)
        assert told.gradients == pytest.approx(gradients, rel=0.05)
        assert told.optimizer == pytest.approx(optimizer, rel=0.05)
        assert told.activations + told.logits == pytest.approx(kept, rel=within)
