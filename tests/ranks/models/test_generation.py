"""``generate`` against transformers' own, token by token, under every layout."""

from typing import Any

import pytest
import torch

from tests import writers
from tests.parallel import Layout
from tests.ranks import run_ranks

NAMES = ("gpt2", "llama", "t5", "t5-1.1")
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy-end": {"eos_token_id": "END"},
    "greedy-repetition": {"repetition_penalty": 1.7},
    "beams": {"num_beams": 3},
    "beams-short": {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never", "eos_token_id": "END"},
    "beams-long": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": "END"},
    "beams-repetition": {"num_beams": 2, "repetition_penalty": 1.7, "eos_token_id": "END"},
    # The same draws as transformers', from the same seed.
    "drawn": {"do_sample": True, "seed": 5},
    "drawn-top": {"do_sample": True, "seed": 6, "temperature": 2.5, "top_k": 60, "top_p": 0.9, "eos_token_id": "END"},
    "drawn-beams": {"do_sample": True, "seed": 7, "num_beams": 2, "top_k": 40, "eos_token_id": "END"},
}


def asked(name: str, request: str) -> dict[str, Any]:
    """The arguments; END is a token that the truth writes in the midst of a text."""
    end = int(writers.truth(name)[0, -6])
    return {key: end if value == "END" else value for key, value in REQUESTS[request].items()}


def assert_as_transformers(name: str, request: str, texts: torch.Tensor) -> None:
    wanted = writers.truth(name, **asked(name, request))
    assert texts.tolist() == wanted.tolist(), f"{name} {request}"


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
    for texts in run_ranks(layout.world_size, write, name, layout.tp, layout.pp):
        for request, found in texts.items():
            assert_as_transformers(name, request, found)
