"""Importing the package imports nothing heavy, and what it has to do it does when Lightning or megatron-core come."""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import lightning_megatron
from lightning_megatron.distributed.when_imported import when_imported
from tests.support.pages import ROOT


def imported_for_type_checkers(package):
    """The names under ``if TYPE_CHECKING``, each with the module that it is imported from."""
    (typed,) = (node for node in ast.parse(inspect.getsource(package)).body if isinstance(node, ast.If))
    prefix = f"{package.__name__}."
    return {(each.module.removeprefix(prefix), alias.name) for each in typed.body for alias in each.names}


def test_the_names_agree():
    told = imported_for_type_checkers(lightning_megatron)
    assert told == {(module, name) for module, names in lightning_megatron._NAMES.items() for name in names}
    assert {name for _, name in told} | {"__version__"} == set(lightning_megatron.__all__)
    assert {*lightning_megatron.__all__} <= {*dir(lightning_megatron)}
    for module, name in told:
        assert getattr(lightning_megatron, name) is getattr(
            importlib.import_module(f"lightning_megatron.{module}"), name
        )
    with pytest.raises(AttributeError, match="no attribute 'GPTModul'"):
        lightning_megatron.GPTModul  # noqa: B018


@pytest.mark.parametrize("folder", ["checkpoint", "cli", "data", "models", "strategy"])
def test_the_names_of_a_folder_agree(folder):
    package = importlib.import_module(f"lightning_megatron.{folder}")
    told = imported_for_type_checkers(package)
    assert {name for _, name in told} == set(package.__all__)
    for module, name in told:
        found = package.__getattr__(name)  # which does not look at what is imported already
        assert found is getattr(importlib.import_module(f"{package.__name__}.{module}"), name)
    with pytest.raises(AttributeError, match=f"module 'lightning_megatron.{folder}' has no attribute 'GPTModul'"):
        package.GPTModul  # noqa: B018


def test_something_is_done_when_a_module_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "comes_later.py").write_text("value = 1\n")
    seen = []
    finders = list(sys.meta_path)
    when_imported("comes_later", lambda: seen.append(sys.modules["comes_later"].value))
    assert seen == []
    module = importlib.import_module("comes_later")
    assert seen == [1]
    assert sys.meta_path == finders
    assert module.__spec__.loader.get_filename() == str(tmp_path / "comes_later.py")
    when_imported("comes_later", lambda: seen.append("again"))
    assert seen == [1, "again"]


ORDERS = ["import lightning_megatron; import lightning.pytorch", "import lightning.pytorch; import lightning_megatron"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_strategy_is_known_by_name_in_any_order(order):
    code = f"""
{order}
import sys
assert "lightning_megatron.strategy.megatron_strategy" not in sys.modules
trainer = lightning.pytorch.Trainer(strategy="megatron", accelerator="cpu", devices=1, logger=False)
assert type(trainer.strategy) is lightning_megatron.MegatronStrategy
import megatron.core.jit, torch
assert torch.cuda.is_available() or megatron.core.jit.jit_fuser is megatron.core.jit.noop_decorator
import lightning.pytorch.cli
assert "lightning_megatron.data" in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)
