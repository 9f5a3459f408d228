"""Replicas that hold experts together write what one process writes, each its own texts, however long these are."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_megatron import GPTConfig, Kernels, on_all_stages
from tests.reference import plain_experts
from tests.reference.parallel_experts import LoadedMixture
from tests.reference.parallel_gpt import Rows
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import trainer

NEW = 9
MIXTURE = replace(
    plain_experts.MIXTURE, experts=replace(plain_experts.MIXTURE.experts, capacity_factor=0.5), seq_length=32
)
ODD = replace(plain_experts.ODD, seq_length=32)
# Token 7 ends texts: those of a replica end earlier than the other's.
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"eos_token_id": 7},
    "beams": {"num_beams": 3, "eos_token_id": 7},
    "drawn": {"do_sample": True, "seed": 5, "temperature": 2.0},
}


def prompts(number: int) -> dict[str, torch.Tensor]:
    """Those of a replica: as many as its number, longer for the next replica, and padded."""
    ids = torch.randint(8, 60, (number + 1, 4 + 3 * number), generator=torch.Generator().manual_seed(number))
    mask = torch.ones_like(ids)
    mask[0, :number] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Writer(LoadedMixture):
    """Writes what follows each batch, all requests in turn."""

    found: list[dict[str, torch.Tensor]]

    def check_batch(self, batch: Any) -> None:
        """A batch is the number of the prompts."""

    @on_all_stages
    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        given = prompts(int(batch["number"][0]))
        new = {"max_new_tokens": NEW - int(batch["number"][0]), "pad_token_id": 0}
        self.found.append({name: self.generate(**given, **new, **request) for name, request in REQUESTS.items()})
        return given["input_ids"]


def write(config: GPTConfig, layout: Layout, numbers: list[int], **options: Any) -> list[dict[str, torch.Tensor]]:
    """What a rank's replica writes, behind each of its batches."""
    module = Writer(config)
    module.found = []
    trainer(layout, options).predict(module, DataLoader(Rows({"number": torch.tensor(numbers)}), batch_size=1))
    return module.found


@functools.cache
def truth(name: str) -> list[dict[str, torch.Tensor]]:
    return run_in_pool(1, write, globals()[name], Layout(), [0, 1, 2], timeout=600)[0]


def assert_same_texts(name: str, layout: Layout, **options: Any) -> None:
    numbers = [0, 1, 2]
    expected = truth(name)
    assert len({texts["greedy"].size(1) for texts in expected}) > 1
    replicas = layout.world_size // layout.tp // layout.pp // layout.cp
    found = run_in_pool(
        layout.world_size, functools.partial(write, **options), globals()[name], layout, numbers, timeout=600
    )
    for rank, seen in enumerate(found):
        number = rank // (layout.tp * layout.cp) % replicas
        own = numbers[number::replicas]
        own += own[-1:] * (-(-len(numbers) // replicas) - len(own))  # one that has no batch left repeats its last
        for texts, mine in zip(seen, own, strict=True):
            for request, text in texts.items():
                assert torch.equal(text, expected[mine][request]), (rank, request)


@pytest.mark.parametrize(
    ("layout", "dispatch"),
    [
        (Layout(dp=2, ep=2), "alltoall"),
        (Layout(dp=2, ep=2), "allgather"),
        (Layout(dp=2, etp=2), "alltoall"),
        (Layout(dp=2, etp=2), "allgather"),
        (Layout(tp=2, ep=2, etp=1, sp=True), "alltoall"),
        (Layout(tp=2, dp=2, ep=2, sp=True), "alltoall"),
        (Layout(pp=2, dp=2, ep=2), "alltoall"),
    ],
    ids=str,
)
def test_texts_are_those_of_one_process(layout, dispatch):
    assert_same_texts("MIXTURE", layout, kernels=Kernels(expert_dispatch=dispatch))


@pytest.mark.parametrize("layout", [Layout(pp=2, vp=1, dp=2, ep=2), Layout(cp=2, ep=2)], ids=str)
def test_shared_experts_and_dense_layers(layout):
    assert_same_texts("ODD", replace(layout, vp=None))


class Failing(Writer):
    """Has a user's processor that fails on one replica in the middle of a text, or prompts that are wrong there."""

    kind = "processor"

    @on_all_stages
    def predict_step(self, batch: Any, batch_idx: int) -> None:
        bad = int(batch["number"][0]) == 1
        ids = torch.full((1, 3), 500 if bad and self.kind == "prompt" else 5)
        seen = []

        def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(1)
            if bad and len(seen) == 3:
                raise KeyError("mine")
            return scores

        processors = [fail] if self.kind == "processor" else None
        self.generate(ids, max_new_tokens=6, logits_processor=processors)


def fail(kind: str) -> str:
    module = Failing(ODD)
    module.kind = kind
    try:
        trainer(Layout(dp=2, ep=2)).predict(module, DataLoader(Rows({"number": torch.tensor([0, 1])}), batch_size=1))
    except Exception as error:
        return repr(error)
    return "wrote"


def test_an_error_on_one_replica_ends_both():
    first, second = run_in_pool(2, fail, "prompt")
    assert "Rank 1 refuses its prompts: " in first
    assert "token id 500" in first
    assert "token id 500" in second
    with pytest.raises(RankError, match="KeyError.*mine"):
        run_ranks(2, fail_loudly, "processor")


def fail_loudly(kind: str) -> None:
    module = Failing(ODD)
    module.kind = kind
    trainer(Layout(dp=2, ep=2)).predict(module, DataLoader(Rows({"number": torch.tensor([0, 1])}), batch_size=1))
