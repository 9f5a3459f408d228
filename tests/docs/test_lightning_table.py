"""``docs/lightning.md`` has a row for everything that Lightning offers, and each row a test that exists."""

import ast
import inspect
import re
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, callbacks, loggers
from lightning.pytorch.callbacks import SpikeDetection
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from torch.utils.data import DataLoader

from lightning_megatron import MegatronStrategy
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, OurGPT
from tests.support.pages import ROOT, path_of_test
from tests.support.plain_module import PlainModule
from tests.support.ranks import run_ranks
from tests.support.trainer import QUIET, trainer


def _public(*kinds: type) -> set[str]:
    names = {name for kind in kinds for name in vars(kind) if not name.startswith("_")}
    return {name for name in names if not name.startswith("CHECKPOINT_") and name != "name"}


OFFERED = {
    "Arguments of the Trainer": set(inspect.signature(Trainer.__init__).parameters) - {"self"},
    "Hooks of the module": _public(LightningModule, ModelHooks, DataHooks, CheckpointHooks),
    "Hooks of the data module": _public(LightningDataModule, DataHooks),
    "Hooks of callbacks": _public(Callback),
    "Callbacks": set(callbacks.__all__),
    "Loggers": set(loggers.__all__),
}


def _rows(section: str) -> list[list[str]]:
    text = (ROOT / "docs/lightning.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("section", OFFERED)
def test_everything_has_a_row(section):
    named = [name for row in _rows(section) for name in re.findall(r"`([^`]+)`", row[0])]
    assert len(named) == len(set(named))
    assert set(named) == OFFERED[section]


@pytest.mark.parametrize("section", OFFERED)
def test_every_row_names_a_test(section):
    for names, says, test in _rows(section):
        assert len(says) > 4, names
        file, name = test.strip("` ").split("::")
        tree = ast.parse(path_of_test(file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test


def test_the_world_spans_the_nodes():
    strategy = MegatronStrategy(tp=4)
    Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=strategy, **QUIET)
    assert strategy.layout.world_size == 4
    with pytest.raises(Exception, match="do not divide the world of 4"):
        Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=MegatronStrategy(tp=3), **QUIET)


class CompiledParts(PlainModule):
    def configure_model(self) -> None:
        if isinstance(self.layers, torch.nn.Sequential):
            self.layers = torch.compile(self.layers, backend="eager")

    optimizer = staticmethod(lambda parameters: torch.optim.SGD(parameters, lr=0.05))


class UncompiledParts(CompiledParts):
    def configure_model(self) -> None:
        pass


def _compiled(kind: type) -> Any:
    module = kind()
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    data = DataLoader(Rows({"x": x, "y": x[:, :1]}), batch_size=4)
    run = trainer(Layout(), max_steps=4, use_distributed_sampler=False)
    run.fit(module, data)
    return [parameter.detach() for parameter in module.parameters()], type(module.layers).__name__


def test_a_module_may_compile_its_parts():
    (compiled, kind), (plain, _) = (run_ranks(1, _compiled, k)[0] for k in (CompiledParts, UncompiledParts))
    assert kind == "OptimizedModule"
    for mine, reference in zip(compiled, plain, strict=True):
        torch.testing.assert_close(mine, reference)


class Spiked(OurGPT):
    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        total, tokens = super().loss(output, batch)
        return total * (50 if self.global_step == 5 else 1), tokens


def _spike(layout: Layout, folder: str) -> bool:
    watch = SpikeDetection(window=4, warmup=2, exclude_batches_path=f"{folder}/skip.json")
    run = trainer(layout, max_steps=8, callbacks=[watch])
    try:
        run.fit(Spiked(CONFIG), DataLoader(Rows(text_samples(CONFIG, 64)), batch_size=4))
    except Exception as error:
        return "spike" in f"{type(error).__name__}{error}".lower()
    return False


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(tp=2, dp=2)], ids=str)
def test_spike_detection(layout, tmp_path):
    assert all(run_ranks(layout.world_size, _spike, layout, str(tmp_path), timeout=60))
