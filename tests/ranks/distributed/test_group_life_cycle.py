"""Process groups that somebody ends or replaces between two fits, and what is let go when they end."""

import gc
import os

import psutil
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy
from megatron.core import parallel_state
from torch.utils.data import DataLoader

from lightning_megatron import MegatronStrategy
from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.layout import ParallelLayout
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, Watch, text_samples
from tests.support.layout import Layout
from tests.support.ranks import run_ranks
from tests.support.trainer import QUIET

TP, PP, DP = Layout(tp=2, sp=True), Layout(pp=2), Layout(dp=2)


def fit(module, layout, steps=2):
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=layout.world_size,
        strategy=layout.strategy(),
        max_steps=steps,
        callbacks=[watch],
        use_distributed_sampler=False,
        **QUIET,
    )
    trainer.fit(module, DataLoader(Rows(text_samples(plain_gpt.GPT2, 4 * steps)), batch_size=4))
    return watch.losses


def nothing():
    pass


def destroyed():
    """At a new port, since torch's own meetings find the store of an earlier one for as long as anybody holds it."""
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def another_default_group():
    destroyed()
    dist.init_process_group("gloo")


def another_layout():
    fit(LoadedGPT(plain_gpt.GPT2), DP)


def lightnings_ddp():
    destroyed()
    options = {"accelerator": "cpu", "devices": 2, "max_steps": 1, "limit_val_batches": 0, **QUIET}
    Trainer(strategy=DDPStrategy(process_group_backend="gloo"), **options).fit(BoringModel())


def one_group():
    dist.destroy_process_group(parallel_state.get_model_parallel_group())


def megatrons_own_groups():
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()  # of other sizes, as another library wants them


BETWEEN = [
    nothing,
    dist.destroy_process_group,
    process_groups.destroy,
    parallel_state.destroy_model_parallel,
    another_default_group,
    another_layout,
    lightnings_ddp,
    one_group,
    megatrons_own_groups,
]


def fit_twice_around_each(layout):
    """The losses of two fits of one module, for each of what comes between them."""
    found = []
    for act in BETWEEN:
        module = LoadedGPT(plain_gpt.GPT2)
        before = fit(module, layout)
        act()
        found.append(before + fit(module, layout))
    return found


@pytest.mark.parametrize("layout", [TP, PP], ids=["tp", "pp"])
def test_groups_that_somebody_ends_are_made_again(layout):
    for undisturbed, *disturbed in run_ranks(2, fit_twice_around_each, layout):
        for act, losses in zip(BETWEEN[1:], disturbed, strict=True):
            assert losses == undisturbed, act.__name__  # not a bit of difference


def held():
    gc.collect()
    process = psutil.Process()
    return process.num_threads(), process.num_fds(), process.memory_info().rss


def sweep(cycles):
    """What the process holds after each fit of another layout, ended in turns by us, by the user and not at all."""
    counts = []
    for cycle in range(cycles):
        fit(LoadedGPT(plain_gpt.GPT2), (TP, PP, DP, PP)[cycle % 4], steps=1)
        if cycle % 4 < 3:
            (process_groups.destroy, dist.destroy_process_group, nothing)[cycle % 4]()
        else:
            process_groups.destroy()
            counts.append(held())
    return counts


@pytest.mark.alone
def test_a_sweep_over_layouts_stays_flat():
    for (threads, files, memory), *_, (threads_then, files_then, memory_then) in run_ranks(2, sweep, 20):
        # One that is just about to end may be counted; a single group that is kept at each cycle would be 48 threads.
        assert threads_then <= threads + 4
        assert files_then <= files + 4
        assert memory_then - memory < 2**25  # the allocator's own ups and downs; a model with its groups is about 2 MB


def kept_trainers_on_one_rank():
    counts = []
    for _ in range(3):
        trainer = Trainer(accelerator="cpu", strategy=MegatronStrategy(), max_steps=1, limit_val_batches=0, **QUIET)
        trainer.fit(BoringModel())
        counts.append(held()[:2])
    return counts


@pytest.mark.alone
def test_one_rank_needs_few_threads_and_files():
    counts = run_ranks(1, kept_trainers_on_one_rank)[0]
    assert len(set(counts)) == 1
    threads, files = counts[0]
    assert threads < 15
    assert files < 40


def build_for_another_number_of_ranks():
    process_groups.init_default_group(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"has 1 ranks, and the layout has 2 \(tp=2.*destroy_process_group"):
        process_groups.build(ParallelLayout(world_size=2, tp=2))


def test_a_default_group_of_another_size_is_refused():
    run_ranks(1, build_for_another_number_of_ranks)
