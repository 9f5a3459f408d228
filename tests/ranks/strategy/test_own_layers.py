"""A model of the user's own on several ranks: what is missing on any of them, first weights, checkpoints, precision."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.utils.data import DataLoader

from lightning_megatron import MegatronModule, ModelChunk
from tests.reference.parallel_vit import example
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import trainer

vit = example("train_vit")


class Block(torch.nn.Module):
    """A layer of the user's, with parallel layers in it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        init = config.init_method
        self.up = ColumnParallelLinear(8, 16, config=config, init_method=init, gather_output=False)
        self.down = RowParallelLinear(
            16, 8, config=config, init_method=init, bias=True, input_is_parallel=True, skip_bias_add=False
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(self.up(hidden)[0].relu())[0]


class Stack(ModelChunk):
    """Four blocks over the pipeline stages, between hidden states ``[1, b, 8]``."""

    def __init__(self, *args: Any, numbered: bool = True) -> None:
        super().__init__(*args)
        self.layers = torch.nn.ModuleList()
        for number in self.layer_numbers:
            self.layers.append(Block(self.config))
            if numbered:
                self.layers[-1].layer_number = number

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = x[None] if self.pre_process else self.input_tensor
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[0] if self.post_process else hidden.transpose(0, 1)[:].transpose(0, 1)  # a view


class Blocks(MegatronModule):
    numbered, length = True, 1

    def build_model(self, pre_process, post_process, vp_stage):
        config = self.transformer_config(hidden_size=8, num_layers=4, num_attention_heads=2, init_method_std=0.3)
        return Stack(config, pre_process, post_process, vp_stage, numbered=self.numbered)

    def sequence_length(self, batch):
        return self.length

    def loss(self, output, batch):
        return (output - batch["y"]).square().mean()


class Unnumbered(Blocks):
    numbered = False


class WrongLength(Blocks):
    length = 3


class HalfDone(Blocks):
    """Whose second stage has a layer of torch's alone, and which shares nothing out."""

    def build_model(self, pre_process, post_process, vp_stage):
        if post_process:
            return torch.nn.Linear(8, 8)
        return ModelChunk(self.transformer_config(hidden_size=8, pipeline_dtype=torch.bfloat16), True, False)


def rows() -> DataLoader:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(5))
    return DataLoader([{"x": row, "y": row.flip(0)} for row in x], batch_size=8)


def fit(kind: Any, layout: Layout, path: str | None = None, steps: int = 2, load: str | None = None) -> Any:
    torch.manual_seed(1)
    module = kind(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    run = trainer(layout, max_steps=steps, use_distributed_sampler=False)
    run.fit(module, rows(), ckpt_path=load)
    if path is not None:
        run.save_checkpoint(path)
    return float(run.callback_metrics["train_loss"]), [name for name, _ in module.named_parameters()]


def test_all_that_is_missing_on_any_stage_is_told_on_all_ranks():
    with pytest.raises(RankError) as error:
        run_ranks(4, fit, HalfDone, Layout(tp=2, pp=2))
    message = str(error.value)
    for text in (
        "HalfDone.build_model made a model that this run cannot train",
        "- ModelChunk on pipeline stage 0 has a config with pipeline_dtype=torch.bfloat16 where the run has",
        "- Linear on pipeline stage 1 has no config, model_type",
        "- No weight is shared out, so each of the 2 tensor-parallel ranks holds all of them",
    ):
        assert message.count(text) == 4, text


def test_layers_without_a_number_are_refused():
    with pytest.raises(RankError, match=r"Weights of several chunks have one name: layers.0.up.weight.*layer_number"):
        run_ranks(2, fit, Unnumbered, Layout(pp=2))


def test_hidden_states_of_another_shape_are_refused():
    with pytest.raises(RankError, match=r"passes hidden states of shape \[1, 2, 8\] on, .* waits for \[3, 2, 8\]"):
        run_ranks(2, fit, WrongLength, Layout(pp=2))


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2, vp=2)], ids=str)
def test_layers_of_the_users_own_start_alike_and_move_to_another_layout(layout, tmp_path):
    (alone,) = run_in_pool(1, fit, Blocks, Layout(), None, 4)
    (two,) = run_in_pool(1, fit, Blocks, Layout())
    path = str(tmp_path / "own.ckpt")
    seen = run_in_pool(layout.world_size, fit, Blocks, layout, path)
    assert [loss for loss, _ in seen] == pytest.approx([two[0]] * layout.world_size, rel=1e-5)
    assert {name for _, names in seen for name in names} == set(alone[1])
    (resumed,) = run_in_pool(1, fit, Blocks, Layout(), None, 4, path)
    assert resumed[0] == pytest.approx(alone[0], rel=1e-5)


def _vit(precision: str) -> tuple[float, float]:
    module, data = vit.ViTModule(num_layers=2, hidden_size=16), vit.Shapes(train_images=64, val_images=12)
    run = trainer(Layout(tp=2), precision=precision, max_steps=2)
    run.fit(module, data)
    return float(run.callback_metrics["train_loss"]), float(run.callback_metrics["val_accuracy"])


def test_vit_in_bf16():
    for (loss, accuracy), (exact, _) in zip(
        run_in_pool(2, _vit, "bf16-mixed"), run_in_pool(2, _vit, "32-true"), strict=True
    ):
        assert loss == pytest.approx(exact, rel=0.02)
        assert 0 <= accuracy <= 1
