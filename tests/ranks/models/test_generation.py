"""``generate`` against transformers' own, token by token, under every layout."""

from typing import Any

import pytest
import torch

from tests.support import writers
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.writers import REQUESTS, asked, assert_as_transformers

NAMES = ("gpt2", "llama", "t5", "t5-1.1")


def write(name: str, tp: int, pp: int) -> dict[str, torch.Tensor]:
    """On a rank that torchrun has started, without a Trainer."""
    module = writers.module(name).build(tp=tp, pp=pp)
    return {request: ask(module, name, request) for request in REQUESTS}


def ask(module: Any, name: str, request: str) -> torch.Tensor:
    options = {"pad_token_id": 0, **asked(name, request)}
    return module.generate(**writers.prompts(name), max_new_tokens=writers.NEW, **options)


@pytest.mark.parametrize("name", writers.MODELS)
def test_one_process_writes_as_transformers(name: str) -> None:
    module = writers.module(name)
    for request in REQUESTS:
        assert_as_transformers(name, request, ask(module, name, request))


def test_the_truth_is_worth_comparing_with() -> None:
    for name in writers.MODELS:
        texts = writers.truth(name)[:, -writers.NEW :].tolist()
        assert sum(len(set(text)) for text in texts) > 9, f"{name} repeats itself"
        ended = writers.truth(name, **asked(name, "greedy-end"))
        assert (ended[0] == 0).any() or ended.size(1) < writers.truth(name).size(1), f"{name} ends no text"


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_rank_writes_as_transformers(name: str, layout: Layout) -> None:
    for texts in run_in_pool(layout.world_size, write, name, layout.tp, layout.pp):
        for request, found in texts.items():
            assert_as_transformers(name, request, found)
