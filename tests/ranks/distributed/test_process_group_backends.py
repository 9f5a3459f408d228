"""Groups follow the device: what cannot carry its tensors makes way, or is refused in words.

No GPU is needed: the functions that decide are told of one, in a process that has trained on the CPU.
"""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_megatron import AutoModule, GPTModule, MegatronStrategy
from lightning_megatron.distributed import process_group_backends
from tests.reference import plain_gpt, pretrained
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.ranks import run_ranks
from tests.support.trainer import trainer

CUDA = torch.device("cuda", 0)


def test_the_back_end_follows_the_device() -> None:
    choose = process_group_backends.choose
    assert (choose("cpu", None), choose("cuda", None)) == ("gloo", "nccl")
    assert (choose("cpu", "gloo"), choose("cuda", "nccl")) == ("gloo", "nccl")
    with pytest.raises(MisconfigurationException, match="'gloo'.*on 'cuda'.*segmentation fault.*takes 'nccl'"):
        choose("cuda", "gloo")
    with pytest.raises(MisconfigurationException, match="'nccl'.*on 'cpu'.*between GPUs only.*takes 'gloo'"):
        choose("cpu", "nccl")


@pytest.mark.parametrize(
    ("configuration", "devices"),
    [
        ("cpu:gloo,cuda:gloo", {"cpu"}),
        ("cuda:nccl", {"cuda"}),
        ("cpu:gloo,cuda:nccl", {"cpu", "cuda"}),
        ("cpu:mpi,cuda:ucc", {"cpu", "cuda"}),
    ],
)
def test_what_a_group_carries(configuration: str, devices: set[str]) -> None:
    assert {device for device in ("cpu", "cuda") if process_group_backends.supports(configuration, device)} == devices


def test_a_trainer_refuses_before_anything_starts() -> None:
    with pytest.raises(MisconfigurationException, match="process_group_backend='nccl'"):
        Trainer(accelerator="cpu", devices=2, strategy=MegatronStrategy(tp=2, process_group_backend="nccl"))


def _train(layout: Layout) -> float:
    run = trainer(layout, max_steps=2)
    data = torch.utils.data.DataLoader(Rows(text_samples(plain_gpt.GPT2, 8)), batch_size=4)
    run.fit(GPTModule(plain_gpt.GPT2), data)
    return float(run.callback_metrics["train_loss"])


def _after_pending_saves() -> tuple[list[float], list[bool]]:
    """Train; begin a run on a GPU, as far as its groups go; and train on the CPU again, in other groups."""
    torch.manual_seed(1)
    losses, stand = [_train(Layout(tp=2))], []
    for device in (torch.device("cpu"), CUDA):
        process_group_backends.destroy_unsuitable(device)
        stand.append(dist.is_initialized())
    torch.manual_seed(1)
    losses.append(_train(Layout(tp=2)))
    return losses, stand


def test_groups_of_a_run_on_the_cpu_make_way_for_a_gpu() -> None:
    for losses, stand in run_ranks(2, _after_pending_saves):
        assert stand == [True, False]
        assert losses[0] == losses[1]


def _somebody_elses() -> list[bool]:
    dist.init_process_group("gloo", rank=0, world_size=1)
    process_group_backends.destroy_unsuitable(torch.device("cpu"))
    with pytest.raises(MisconfigurationException, match="'cpu:gloo,cuda:gloo', and a model on 'cuda' needs 'nccl'"):
        process_group_backends.destroy_unsuitable(CUDA)
    with pytest.raises(MisconfigurationException, match="Something else in this program has created the group"):
        process_group_backends.init_for_build(CUDA)
    return [dist.is_initialized()]


def test_groups_of_somebody_else_are_refused_and_left() -> None:
    assert run_ranks(1, _somebody_elses) == [[True]]


def test_a_model_takes_what_it_remembers_to_another_device() -> None:
    """Rotary angles, which megatron-core keeps beside the buffers; "meta" is the other device here."""
    batch = pretrained._batch("llama", 0)
    module = AutoModule.from_pretrained(pretrained.new_model("llama")).build(device="cpu")
    with torch.no_grad():
        module(**batch)
        module.to("meta")
        there = module(**{name: tensor.to("meta") for name, tensor in batch.items()})
    assert there.device.type == "meta"
