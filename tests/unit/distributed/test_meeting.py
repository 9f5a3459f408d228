"""Ranks that do not come to the meeting of a run are named."""

import re
from datetime import timedelta

import pytest

from lightning_megatron.distributed import meeting
from tests.support.ranks import free_port


@pytest.fixture
def alone(monkeypatch):
    """Call this process one rank of several, of which the others never start."""
    monkeypatch.setattr(meeting, "_state", meeting._State())
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port := str(free_port()))

    def told(rank, world_size):
        with pytest.raises(TimeoutError) as error:
            meeting.meet(rank, world_size, timedelta(seconds=1))
        assert "start_timeout=timedelta(minutes=60)" in str(error.value)
        return str(error.value).replace(port, "PORT")

    return told


def test_rank_0_names_those_that_did_not_come(alone):
    assert alone(0, 3).startswith(
        "MegatronStrategy: ranks 1 and 2 of 3 did not start within 0:00:01. What they printed"
    )


def test_many_are_counted(alone):
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more of 20 did not start" in alone(0, 20)


def test_a_rank_that_finds_no_rank_0_says_where_it_looked(alone):
    assert re.match("MegatronStrategy: rank 1 of 2 found no rank 0 at 127.0.0.1:PORT within 0:00:01", alone(1, 2))


def test_one_rank_meets_nobody():
    assert meeting.meet(0, 1, timedelta(seconds=1)) is not None
