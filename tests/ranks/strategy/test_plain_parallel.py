"""A plain LightningModule that makes megatron-core's parallel layers itself trains under tp as its plain twin does."""

from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)

from tests.support.layout import Layout
from tests.support.plain_module import CountingModule, plain_data
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import Logged, trainer

WIDTH, CLIP, STEPS = 12, 0.5, 6
NAMES = ["norm", "up.weight", "up.bias", "down.weight", "down.bias"]


@cache
def first_weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(4,), (2 * WIDTH, 4), (2 * WIDTH,), (1, WIDTH), (1,)]
    return [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]


def mlp(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    norm, up, bias, down, last = weights
    gate, value = F.linear(x * norm, up, bias).chunk(2, dim=-1)
    return F.linear(gate.sigmoid() * value, down, last)


class GatedMLP(pl.LightningModule):
    """``mlp``, its wide layer divided; the gate and the value are two blocks of one weight."""

    def configure_model(self) -> None:
        strategy: Any = self.trainer.strategy
        sp = strategy.layout.uses_sequence_parallel
        config = ModelParallelConfig(tensor_model_parallel_size=strategy.tensor_parallel_size, sequence_parallel=sp)
        init = torch.nn.init.zeros_
        self.norm = torch.nn.Parameter(torch.zeros(4))
        self.norm.sequence_parallel = sp  # type: ignore[attr-defined]
        self.up = ColumnParallelLinear(
            4, 2 * WIDTH, config=config, init_method=init, bias=True, gather_output=False, stride=2
        )
        self.down = RowParallelLinear(
            WIDTH, 1, config=config, init_method=init, bias=True, input_is_parallel=True, skip_bias_add=False
        )
        rank, ranks = strategy.tensor_parallel_rank, strategy.tensor_parallel_size
        norm, up, bias, down, last = first_weights()
        mine = [
            norm,
            *(torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)]) for whole in (up, bias)),
            down.chunk(ranks, dim=1)[rank],
            last,
        ]
        with torch.no_grad():
            for name, weight in zip(NAMES, mine, strict=True):
                self.get_parameter(name).copy_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sp = self.trainer.strategy.layout.uses_sequence_parallel  # type: ignore[attr-defined]
        x = scatter_to_sequence_parallel_region(x) if sp else x
        gate, value = self.up(x * self.norm)[0].chunk(2, dim=-1)
        y = self.down(gate.sigmoid() * value)[0]
        return gather_from_sequence_parallel_region(y, tensor_parallel_output_grad=False) if sp else y

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (self(batch["x"]) - batch["y"]).square().mean()
        self.log("inside", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


@cache
def truth() -> dict[str, Any]:
    weights = [weight.clone().requires_grad_() for weight in first_weights()]
    optimizer = torch.optim.AdamW(weights, lr=0.05)
    losses, norms = [], []
    for batch in list(plain_data())[:STEPS]:
        optimizer.zero_grad()
        loss = (mlp(batch["x"], weights) - batch["y"]).square().mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, CLIP)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "weights": [weight.detach() for weight in weights]}


def train(layout: Layout, path: str, steps: int = STEPS, load: str | None = None) -> dict[str, Any]:
    watch, module = Logged(), GatedMLP()
    run = trainer(
        layout, {"num_microbatches": 1}, max_steps=steps, gradient_clip_val=CLIP, callbacks=[watch],
        use_distributed_sampler=False,
    )  # fmt: skip
    run.fit(module, plain_data(), ckpt_path=load)
    run.save_checkpoint(path)
    seen = {name: [step[key] for step in watch.steps] for name, key in (("losses", "inside"), ("norms", "grad_norm"))}
    return {**seen, "weights": [module.get_parameter(name).detach().clone() for name in NAMES]}


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sp=True), Layout(tp=4)], ids=str)
def test_trains_as_its_twin_and_its_checkpoint_is_whole(layout, tmp_path):
    expected = truth()
    assert max(expected["norms"]) > CLIP
    half = run_in_pool(layout.world_size, train, layout, str(tmp_path / "half.ckpt"), STEPS // 2)
    for seen in half:
        assert seen["losses"] == pytest.approx(expected["losses"][: STEPS // 2], rel=1e-5)
        assert seen["norms"] == pytest.approx(expected["norms"][: STEPS // 2], rel=1e-4)
    continued = partial(train, load=str(tmp_path / "half.ckpt"))
    (alone,) = run_in_pool(1, continued, Layout(), str(tmp_path / "alone.ckpt"))
    assert alone["losses"] == pytest.approx(expected["losses"][STEPS // 2 :], rel=1e-5)
    torch.testing.assert_close(alone["weights"], expected["weights"], rtol=0, atol=1e-5)
    run_in_pool(layout.world_size, train, layout, str(tmp_path / "again.ckpt"), STEPS, str(tmp_path / "half.ckpt"))


class NothingParallel(CountingModule):
    def configure_model(self) -> None:
        """Build nothing that is parallel."""


def _nothing_parallel(run: str) -> None:
    getattr(trainer(Layout(tp=2), max_steps=1), run)(NothingParallel(), plain_data())


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_refused_on_all_ranks_once_it_is_built(run):
    with pytest.raises(RankError) as error:
        run_ranks(2, _nothing_parallel, run)
    for rank in (0, 1):
        assert f"rank {rank}: " in str(error.value)
    assert str(error.value).count("NothingParallel is a plain LightningModule without parallel layers") == 2
