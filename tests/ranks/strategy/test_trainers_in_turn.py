"""Ten Trainers of different strategies, one after the other in one process, each as if it were alone."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_megatron import MegatronStrategy
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, Watch, text_samples
from tests.support.layout import Layout
from tests.support.plain_module import PlainModule
from tests.support.ranks import run_ranks
from tests.support.trainer import QUIET


class Losses(Watch):
    def on_train_batch_end(self, trainer, *_):
        name = "train_loss" if "train_loss" in trainer.callback_metrics else "inside"
        self.losses.append(float(trainer.callback_metrics[name]))


_LAYOUTS = {
    "tp2": Layout(tp=2, sp=True),
    "pp2": Layout(pp=2),
    "interleaved": Layout(pp=2, vp=2),
    "replicated": Layout(dp=2, sharded=False),
}


def _train(kind: str) -> list[float]:
    watch, world = Losses(), torch.distributed.get_world_size() if torch.distributed.is_initialized() else 2
    options = {"accelerator": "cpu", "max_steps": 3, "callbacks": [watch], "use_distributed_sampler": False, **QUIET}
    if kind in _LAYOUTS:
        module = LoadedGPT(plain_gpt.GPT2)
        data = DataLoader(Rows(text_samples(plain_gpt.GPT2, 12)), batch_size=4)
        strategy = _LAYOUTS[kind].strategy()
    else:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(24, 4, generator=generator)
        module, data = PlainModule(), DataLoader(Rows({"x": x, "y": x[:, :1]}), batch_size=4)
        module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.05)
        strategy = {"single": "auto", "ddp": DDPStrategy(process_group_backend="gloo"), "plain": MegatronStrategy()}[
            kind
        ]
    Trainer(devices=1 if kind == "single" else world, strategy=strategy, **options).fit(module, data)
    return watch.losses


def _train_in_turn(kinds: list[str]) -> list[list[float]]:
    return [_train(kind) for kind in kinds]


@pytest.mark.slow
def test_ten_trainers_do_not_disturb_one_another():
    order = ["ddp", "tp2", "plain", "pp2", "ddp", "interleaved", "replicated", "tp2", "plain", "pp2"]
    alone = {kind: run_ranks(2, _train_in_turn, [kind]) for kind in set(order)}
    for rank, seen in enumerate(run_ranks(2, _train_in_turn, order)):
        for kind, losses in zip(order, seen, strict=True):
            assert losses == alone[kind][rank][0], kind  # not a bit of difference


def test_a_single_device_trainer_before_and_after_ours():
    alone = _train_alone("single")
    assert run_ranks(1, _train_in_turn_on_one, ["single", "plain", "single", "ddp", "single"])[0][0::2] == [alone] * 3


def _train_alone(kind: str) -> list[float]:
    return run_ranks(1, _train_in_turn_on_one, [kind])[0][0]


def _train_in_turn_on_one(kinds: list[str]) -> list[list[float]]:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    return [_train(kind) for kind in kinds]
