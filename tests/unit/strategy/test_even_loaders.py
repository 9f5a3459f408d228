"""A loader that is watched is to Lightning what the user's loader is."""

import inspect

from lightning.fabric.utilities.types import _Stateful
from torch.utils.data import DataLoader

from lightning_megatron.strategy.dataloading.rank_consistency import EvenLoader


class Counted(DataLoader):
    given = 0

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def test_state_is_found_as_python_3_12_looks_for_it():
    watched = EvenLoader(loader := Counted([1]))
    assert all(inspect.getattr_static(watched, name, None) for name in ("state_dict", "load_state_dict"))
    watched.load_state_dict({"given": 3})
    assert loader.given == 3
    assert isinstance(watched, _Stateful)
    assert not isinstance(EvenLoader(DataLoader([1])), _Stateful)
