"""What has moved is imported by its former name for one release, with a warning, and is the same module."""

import sys
from importlib import import_module

import pytest

from lightning_megatron.distributed.former_names import FORMER


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_is_the_module_of_today(name):
    sys.modules.pop(f"lightning_megatron.{name}", None)
    with pytest.warns(DeprecationWarning, match=f"lightning_megatron.{FORMER[name]} now"):
        module = import_module(f"lightning_megatron.{name}")
    assert module is import_module(f"lightning_megatron.{FORMER[name]}")


def test_a_module_below_a_former_name_is_not_loaded_twice():
    with pytest.raises(ModuleNotFoundError, match="modules.auto is in lightning_megatron.models now"):
        import_module("lightning_megatron.modules.auto")
