"""The heartbeat of a rank whose rank 0 ends, and the store with it."""

import torch.distributed as dist

from lightning_megatron.distributed import heartbeat


def test_it_ends_without_a_word_when_the_store_has_ended(capfd):
    kept = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    store = dist.TCPStore("127.0.0.1", kept[0].port, is_master=False)
    told = []

    class Stop:
        def wait(self, seconds: float) -> bool:
            told.append(store.get(f"{heartbeat._HERE}1"))
            kept.clear()
            return False

    heartbeat.Heartbeat()._tell(Stop(), store, 1)
    assert len(told) == 1
    assert "c10d" not in capfd.readouterr().err
