"""Multi-latent attention trains as plain PyTorch in one process does, however the model and its rows are divided.

Tolerances as in ``test_truth``.
"""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_megatron import Kernels, on_all_stages
from tests.reference import parallel_gpt, plain_gpt
from tests.reference.same_training import CLIP, ROWS, assert_gpt_trained_alike
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import trainer

STEPS = 5
NAMES = ["LATENT", "LATENT_LITE"]


@functools.cache
def truth(name: str) -> dict[str, Any]:
    config = getattr(plain_gpt, name)
    samples = parallel_gpt.packed_samples if "PACKED" in name else parallel_gpt.text_samples
    return plain_gpt.train(config, samples(config, ROWS * STEPS), ROWS, STEPS, CLIP)


def assert_same_training(name: str, layout: Layout, accumulate: int = 1, **options: Any) -> None:
    expected, config = truth(name), getattr(plain_gpt, name)
    options = {"packed": "PACKED" in name, **options}
    train = functools.partial(parallel_gpt.train, full=expected["weights"], **options)
    ranks = run_in_pool(layout.world_size, train, config, layout, ROWS, STEPS, CLIP, accumulate)
    assert_gpt_trained_alike(ranks, expected, losses=accumulate == 1)


LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(tp=2, pp=2, sp=True),
    Layout(pp=2, vp=2, dp=2),
    Layout(tp=4, sp=True, sharded=False),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_divided(name: str, layout: Layout) -> None:
    assert_same_training(name, layout)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("options", [{"packed": True}, {"packed": "borders", "micro_batch_size": 1}], ids=str)
def test_documents_in_a_row(layout: Layout, options: dict[str, Any]) -> None:
    assert_same_training("PACKED_LATENT", layout, **options)


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(cp=2, tp=2, sp=True)], ids=str)
@pytest.mark.parametrize("comm", ["all_gather", "all_to_all", "ring"])
@pytest.mark.parametrize("name", [*NAMES, "PACKED_LATENT"])
def test_rows_that_ranks_share(name: str, comm: str, layout: Layout) -> None:
    if layout.tp == 1 or name == "PACKED_LATENT":
        assert_same_training(name, layout, cp_comm=comm)


RECOMPUTED = ["full", "selective", ["mla_up_proj"], ["mla_up_proj", "core_attn", "layernorm"]]


@pytest.mark.parametrize("recompute", RECOMPUTED, ids=str)
def test_recomputation_changes_nothing(recompute: Any) -> None:
    assert_same_training("LATENT", Layout(tp=2, sp=True), recompute=recompute)


@pytest.mark.parametrize("kernels", [Kernels(fused_layers=True), Kernels(attention="math")], ids=["fused", "math"])
def test_kernels_change_nothing(kernels: Kernels) -> None:
    assert_same_training("LATENT", Layout(tp=2, sp=True), kernels=kernels)


class Writer(parallel_gpt.LoadedGPT):
    """Writes what follows some prompts, greedily and by beams."""

    found: list[torch.Tensor]

    def check_batch(self, batch: Any) -> None:
        """A batch is nothing that the model reads."""

    @on_all_stages
    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        ids, keep = torch.arange(1, 13).view(2, 6), torch.ones(2, 6, dtype=torch.long)
        keep[0, :2] = 0
        self.found = [self.generate(ids, keep, max_new_tokens=9, pad_token_id=0, num_beams=beams) for beams in (1, 3)]
        return ids


def write(layout: Layout) -> list[torch.Tensor]:
    module = Writer(replace(plain_gpt.LATENT, seq_length=32))
    trainer(layout).predict(module, DataLoader(parallel_gpt.Rows({"number": torch.zeros(1)}), batch_size=1))
    return module.found


def test_texts_are_those_of_one_process() -> None:
    """Every tensor-parallel rank has all latents, and its own heads."""
    expected = run_in_pool(1, write, Layout())[0]
    for rank in run_in_pool(4, write, Layout(tp=2, pp=2, sp=True)):
        for text, other in zip(rank, expected, strict=True):
            assert torch.equal(text, other)


def test_accumulation_is_one_big_batch() -> None:
    assert_same_training("LATENT", Layout(tp=2, dp=2, sp=True), accumulate=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [Layout(tp=2, pp=2, cp=2, sp=True), Layout(pp=2, vp=2, dp=2, cp=2), Layout(tp=4, dp=2)], ids=str
)
def test_eight_ranks(layout: Layout) -> None:
    assert_same_training("LATENT", layout)
