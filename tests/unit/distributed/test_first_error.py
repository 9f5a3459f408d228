"""The store of a run, asked while rank 0, which keeps it, is being ended."""

import time

import pytest
import torch.distributed as dist

from lightning_megatron.distributed import first_error


def test_a_store_that_closes_a_moment_later_is_not_asked(monkeypatch, capfd):
    kept = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    asked = dist.TCPStore("127.0.0.1", kept[0].port, is_master=False)
    monkeypatch.setattr(first_error, "default_store", lambda: asked)
    assert first_error.ask_with_timeout(lambda: asked.add("key", 1), seconds=10) == 1
    monkeypatch.setattr(time, "sleep", lambda seconds: kept.clear())
    with pytest.raises(ConnectionError, match="The store has ended"):
        first_error.ask_with_timeout(lambda: asked.add("key", 1), seconds=10)
    assert "c10d" not in capfd.readouterr().err
