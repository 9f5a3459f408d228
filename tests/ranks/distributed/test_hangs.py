"""Ranks that would wait for one another in vain: told before they do, or told afterwards where each of them is."""

import os
import re
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset

from lightning_megatron.strategy.dataloading.rank_consistency import DataError
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_ranks
from tests.support.small_gpt import SMALL
from tests.support.trainer import trainer


class EndsEarly(IterableDataset):
    """Says that it has 16 rows, and has 8 on the last rank."""

    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Iterator[Any]:
        rows = Rows(text_samples(SMALL, 16))
        yield from (rows[row] for row in range(16 if os.environ["RANK"] == "0" else 8))


class FewerBatches:
    """A batch sampler that says it has 4, and has 3 on the last rank."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([4 * batch + row for row in range(4)] for batch in range(4 if os.environ["RANK"] == "0" else 3))


def _loader(kind: str) -> DataLoader:
    if kind == "fewer":
        return DataLoader(Rows(text_samples(SMALL, 24)), batch_sampler=FewerBatches())
    rank, rows = int(os.environ["RANK"]), Rows(text_samples(SMALL, 24))
    samplers = {"even": range(16), "uneven": range(16 + 8 * rank)}
    return DataLoader(EndsEarly() if kind == "early" else rows, batch_size=4, sampler=samplers.get(kind))


def _told(train: str, val: str | None, **options: Any) -> str:
    # Evaluations of uneven replicas are filled up; of ranks that hold one model they cannot be.
    layout = Layout(tp=2) if val else Layout(dp=2)
    run = trainer(layout, {"timeout": timedelta(seconds=20)}, use_distributed_sampler=False, **options)
    loaders = [_loader(kind) for kind in (train, val) if kind is not None]
    try:
        run.fit(LoadedGPT(SMALL), *loaders)
    except DataError as error:
        return str(error)
    return f"{run.global_step} steps"


def _uneven() -> dict[str, str]:
    return {
        "train": _told("uneven", None, max_epochs=1),
        "validation": _told("even", "uneven", max_epochs=1),
        "sanity check": _told("even", "uneven", max_steps=2, num_sanity_val_steps=2, limit_val_batches=2),
        "limited": _told("uneven", "uneven", max_epochs=2, limit_train_batches=3, limit_val_batches=1),
        "stopped before": _told("uneven", None, max_steps=4, max_epochs=-1),
        "ends early": _told("early", None, max_epochs=1),
        "sampler ends early": _told("fewer", None, max_epochs=1),
        "ends early in validation": _told("even", "early", max_epochs=1),
    }


def test_ranks_with_different_numbers_of_batches_are_told_at_once() -> None:
    different = "Ranks have different numbers of batches, by rank: {0: 4, 1: 6}."
    early = "The loader of ranks [1] ended after 2 batches, and the other ranks' goes on."
    for told in run_ranks(2, _uneven, timeout=200):
        assert told["train"].startswith(different)
        assert told["validation"].startswith(different)
        assert told["ends early"].startswith(early)
        assert told["ends early in validation"].startswith(early)
        assert told["sampler ends early"].startswith("The loader of ranks [1] ended after 3 batches")
        assert told["sanity check"] == "2 steps"
        assert told["limited"] == "6 steps"
        assert told["stopped before"] == "4 steps"


class Strays(Callback):
    """A rank calls what the others do not call, sleeps, or dies."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and run.global_rank == 0 and self.how == "barrier":
            run.strategy.barrier()
        if batch_idx == 2 and run.global_rank == 1 and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

    def on_validation_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if run.global_rank == 1 and batch_idx == 1:
            time.sleep(20)


def _stray(how: str) -> None:
    layout = Layout(pp=2) if how == "killed" else Layout(tp=2)
    run = trainer(layout, {"timeout": timedelta(seconds=4)}, max_steps=6, callbacks=[Strays(how)])
    data = DataLoader(Rows(text_samples(SMALL, 48)), batch_size=4)
    run.validate(LoadedGPT(SMALL), data) if how == "asleep" else run.fit(LoadedGPT(SMALL), data)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            "barrier",
            r"All ranks are alive and wait for each other: ranks \[0\] in barrier, called by on_train_batch_start"
            r" \(.*test_hangs.py:\d+\); ranks \[1\] in \w+, called by",
        ),
        ("asleep", r"rank 1 .*is in no collective; it is in on_validation_batch_start \(.*test_hangs.py"),
        ("killed", r"rank 1 .*no longer reports: its process \d+ has ended without an error"),
    ],
)
def test_a_rank_that_waited_in_vain_is_told_for_whom(how: str, told: str) -> None:
    with pytest.raises(RankError) as error:
        run_ranks(2, _stray, how, timeout=60)
    text = str(error.value)
    assert re.search(told, text), text[-6000:]
    assert "This rank waited in" in text
    if how == "barrier":
        assert "it is dead" not in text
        assert len(re.findall("All ranks are alive", text)) == 2, text[-6000:]


class SlowFirstStep(Callback):
    """Rank 1 needs longer for its first step of training than a collective may take, as if it compiled something."""

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if run.global_rank == 1 and batch_idx == 0:
            time.sleep(5)


def _slow_start() -> int:
    if os.environ["RANK"] == "1":
        time.sleep(5)  # as if it imported
    data = DataLoader(Rows(text_samples(SMALL, 16)), batch_size=4)
    run = trainer(
        Layout(tp=2),
        {"timeout": timedelta(seconds=3)},
        max_steps=3,
        num_sanity_val_steps=1,
        callbacks=[SlowFirstStep()],
    )
    run.fit(LoadedGPT(SMALL), data, data)
    return run.global_step


@pytest.mark.alone
def test_a_slow_start_is_no_hang() -> None:
    assert run_ranks(2, _slow_start, timeout=60) == [3, 3]
