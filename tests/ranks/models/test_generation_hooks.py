"""Hooks of generation on two ranks, and ranks that are given different things."""

from typing import Any

import pytest
import torch
import transformers as hf

from tests.support import writers
from tests.support.ranks import RankError, run_ranks


class Puts:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.kept.append(value.tolist())

    def end(self) -> None:
        self.kept.append("end")


class Fails(hf.LogitsProcessor):
    """On one rank, at its third token."""

    calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3 and torch.distributed.get_rank() == 1:
            raise KeyError("no such token")
        return scores


class LaterOnTheSecond(hf.StoppingCriteria):
    """Ranks differ, as their clocks do."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        limit = 10 + 3 * torch.distributed.get_rank()
        return torch.full((len(input_ids),), input_ids.size(1) >= limit)


def on_two_ranks() -> dict[str, Any]:
    module, streamer = writers.module("gpt2").build(tp=1, pp=2), Puts()
    found: dict[str, Any] = {
        "ends": module.generate(**writers.prompts("gpt2"), stopping_criteria=[LaterOnTheSecond()]).tolist(),
        "time": module.generate(**writers.prompts("gpt2"), max_time=0.0).tolist(),
        "texts": module.generate(**writers.prompts("gpt2"), max_new_tokens=3, streamer=streamer).tolist(),
        "drawn": module.generate(
            **writers.prompts("gpt2"), max_new_tokens=6, do_sample=True, num_return_sequences=2, seed=3
        ).tolist(),
        "put": streamer.kept,
    }
    try:
        module.generate(**writers.prompts("gpt2"), max_new_tokens=9, logits_processor=[Fails()])
    except RuntimeError as error:
        found["error"] = str(error)
    return found


def test_hooks_are_one_over_the_ranks() -> None:
    first, second = run_ranks(2, on_two_ranks)
    for key in ("ends", "time", "texts", "drawn"):
        assert first[key] == second[key], key
    assert {len(text) for text in first["ends"]} == {10}
    assert {len(text) for text in first["time"]} == {8}
    assert first["error"] == second["error"] == "generate: Fails has failed with KeyError('no such token')."
    assert second["put"] == []
    assert first["put"][0] == writers.prompts("gpt2")["input_ids"].tolist()
    assert first["put"][1:] == [[text[place] for text in first["texts"]] for place in (7, 8, 9)] + ["end"]
    alone = writers.module("gpt2").generate(
        **writers.prompts("gpt2"), max_new_tokens=6, do_sample=True, num_return_sequences=2, seed=3
    )
    assert first["drawn"] == alone.tolist()


def test_ranks_that_are_given_different_things_are_told_so() -> None:
    with pytest.raises(RankError, match="prompts or settings of model-parallel rank 1 differ"):
        run_ranks(2, differently)


def differently() -> None:
    module = writers.module("gpt2").build(tp=1, pp=2)
    module.generate(**writers.prompts("gpt2"), min_new_tokens=torch.distributed.get_rank())
