"""What plain LightningModules do between the lines, against vanilla Lightning on one process or under DDP."""

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from megatron.core.distributed import DistributedDataParallelConfig
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, SumMetric

from lightning_megatron import MegatronStrategy
from tests.reference.parallel_gpt import Rows
from tests.support.ranks import RankError, run_ranks
from tests.support.trainer import QUIET

DDP = DistributedDataParallelConfig()  # which asks for a schedule


class Base(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)
        self.notes: list[Any] = []

    def compute(self, batch: Any) -> torch.Tensor:
        return (self.b(torch.tanh(self.a(batch["x"]))) - batch["y"]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.compute(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


class ComplexBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(2), torch.tensor([0.5, 1.0])))
        self.register_buffer("count", torch.tensor(16777217.0, dtype=torch.float64))

    def compute(self, batch: Any) -> torch.Tensor:
        self.notes.append((batch["y"].dtype, self.count.item()))
        turned = torch.view_as_real(torch.view_as_complex(batch["x"].view(-1, 2, 2)) * self.turn).reshape(-1, 4)
        return super().compute({"x": turned, "y": batch["y"]})


class Reassigned(Base):
    """Puts its weights elsewhere: ``vector_to_parameters`` assigns ``parameter.data``."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step in (2, 5):
            vector = torch.nn.utils.parameters_to_vector(self.parameters())
            torch.nn.utils.vector_to_parameters(vector * 0.5, self.parameters())


class SetAtStart(Base):
    def on_train_start(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(0.25)


class Running(Base):
    """torchmetrics used by hand: `compute` in a step, `reset` every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.total = MeanMetric(), SumMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.mean.update(float(batch_idx))
        self.notes.append(float(self.mean.compute()))
        if batch_idx % 2:
            self.mean.reset()
            self.log("total", self.total, on_step=True)
        self.total.update(1.0)
        self.log("twice", 1.0)
        self.notes.append(sorted(self.trainer.callback_metrics))
        return self.compute(batch)


class Clamping(Base):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        for parameter in self.parameters():
            parameter.grad.clamp_(-0.01, 0.01)
        optimizer.step()


class ByGroup(Base):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.clamp_(-0.01, 0.01)


class Skipping(Base):
    def on_after_backward(self) -> None:
        if self.trainer.global_step % 2:
            self.zero_grad()


class Noisy(Base):
    """Draws with the user's own generator."""

    def on_train_start(self) -> None:
        torch.manual_seed(100 + self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.notes.append(torch.rand(3).tolist())
        return self.compute(batch)


class OneNumber(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.compute(batch).view(1)}


class Stepped(Base):
    def on_train_start(self) -> None:
        self.trainer.optimizers[0].register_step_post_hook(lambda *_: self.notes.append("stepped"))


class Ones(Base):
    """Makes a tensor in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.compute(batch) + self.a(torch.ones(4, 4)).mean()


KINDS = [
    ComplexBuffer, Reassigned, SetAtStart, Running, Clamping, ByGroup, Skipping, Noisy, OneNumber, Stepped,
]  # fmt: skip


def fit(kind: type, ours: dict[str, Any] | None, precision: str = "32-true", devices: int = 1) -> Any:
    g = torch.Generator().manual_seed(5)
    rows = Rows({"x": torch.randn(32, 4, generator=g), "y": torch.randn(32, 1, generator=g, dtype=torch.float64)})
    if kind is not ComplexBuffer:
        rows.samples["y"] = rows.samples["y"].float()
    module, strategy = kind(), "auto" if devices == 1 else "ddp"
    if ours is not None:
        strategy = MegatronStrategy(**ours)
    run = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, precision=precision, max_epochs=1,
        use_distributed_sampler=False, **QUIET,
    )  # fmt: skip
    run.fit(module, DataLoader(rows, batch_size=4))
    state = {name: value.detach() for name, value in module.state_dict().items()}
    return state, module.notes, {name: float(value) for name, value in run.callback_metrics.items()}


@functools.cache
def vanilla(kind: type, precision: str = "32-true", devices: int = 1) -> Any:
    return run_ranks(devices, fit, kind, None, precision, devices)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"ddp": DDP}, {"ddp": DDP, "distributed_optimizer": False}],
    ids=["Lightning's loop", "sharded", "replicated"],
)
def test_as_vanilla_lightning(kind, options):
    options = {**options, "on_nonfinite": "ignore"}
    ((state, notes, metrics),) = run_ranks(1, fit, kind, options)
    ((expected, reference, values),) = vanilla(kind)
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-6)
    assert notes == reference
    metrics.pop("train_loss", None)
    assert metrics == pytest.approx(values)


@pytest.mark.parametrize("kind", [SetAtStart, Ones])
def test_in_low_precision(kind):
    ((state, *_),) = run_ranks(1, fit, kind, {}, "bf16-true")
    ((expected, *_),) = vanilla(kind)  # bf16 weights stand still on steps that our fp32 main weights add up
    torch.testing.assert_close({n: v.float() for n, v in state.items()}, expected, rtol=0.05, atol=0.05)


def test_replicas_draw_their_own_noise():
    ours = run_ranks(2, fit, Noisy, {}, "32-true", 2)
    assert [notes for _, notes, _ in ours] == [notes for _, notes, _ in vanilla(Noisy, devices=2)]
    assert ours[0][1] != ours[1][1]


class Counted(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen = SumMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.update(float(len(batch["x"])))
        self.log("seen", self.seen)


def _counted(strategies: list[Any]) -> float:
    module, rows = Counted(), Rows({"x": torch.randn(8, 4), "y": torch.randn(8, 1)})
    for strategy in strategies:
        run = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, **QUIET)
        run.fit(module, DataLoader(rows, batch_size=2), DataLoader(rows, batch_size=2))
    return float(run.callback_metrics["seen"])


def test_metrics_under_another_strategy_afterwards():
    assert run_ranks(2, _counted, [MegatronStrategy(), "ddp"]) == run_ranks(2, _counted, ["ddp"])


class Freezing(Base):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.a.requires_grad_(False)


class Adding(Base):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})


class Tuple(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.compute(batch), 1.0


class Detached(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.compute(batch).detach()


class NoLoss(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"los": self.compute(batch)}


class Double(Base):
    def __init__(self) -> None:
        super().__init__()
        self.b.double()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Freezing, "requires_grad of a parameter has changed"),
        (Adding, "parameters cannot be added to the optimizer during a run"),
        (Tuple, "training_step returned a tuple"),
        (Detached, "does not require grad"),
        (NoLoss, "a dict with .*los.*key 'loss'"),
        (Double, "b.weight is torch.float64, and this run trains torch.float32"),
    ],
)
def test_refused_rather_than_trained_otherwise(kind, message):
    with pytest.raises(RankError, match=message):
        run_ranks(1, fit, kind, {"ddp": DDP})


class Broken(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2 and self.global_rank == 1:
            raise ValueError("boom")
        return self.compute({**batch, "x": self.norm(batch["x"])})


def _broken(folder: str) -> None:
    rows = Rows({"x": torch.randn(32, 4), "y": torch.randn(32, 1)})
    options = {**QUIET, "enable_checkpointing": True, "callbacks": [OnExceptionCheckpoint(folder)]}
    run = Trainer(accelerator="cpu", devices=2, strategy=MegatronStrategy(), max_epochs=1, **options)
    run.fit(Broken(), DataLoader(rows, batch_size=4))


def test_a_checkpoint_on_one_ranks_exception_waits_for_nobody(tmp_path):
    with pytest.raises(RankError, match="1 of 2 ranks did not raise"):
        run_ranks(2, _broken, str(tmp_path), timeout=60)


class Part(Base):
    """Saves a part of itself."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {n: v for n, v in super().state_dict(*args, **kwargs).items() if n.startswith("b.")}

    @property
    def strict_loading(self) -> bool:
        return False


def _part(folder: str) -> Any:
    rows = Rows({"x": torch.randn(32, 4), "y": torch.randn(32, 1)})

    def made(epochs: int) -> Trainer:
        return Trainer(accelerator="cpu", devices=1, strategy=MegatronStrategy(), max_epochs=epochs, **QUIET)

    first, second, run = Part(), Part(), made(1)
    run.fit(first, DataLoader(rows, batch_size=4))
    run.save_checkpoint(f"{folder}/part.ckpt")
    again = made(2)
    again.validate = None
    second.on_train_start = lambda: second.notes.append(torch.equal(second.b.weight, first.b.weight))
    again.fit(second, DataLoader(rows, batch_size=4), ckpt_path=f"{folder}/part.ckpt")
    return second.notes, again.global_step


def test_a_module_that_saves_a_part_of_itself(tmp_path):
    ((notes, steps),) = run_ranks(1, _part, str(tmp_path))
    assert notes == [True]
    assert steps == 16
