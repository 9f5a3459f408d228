"""Conditions on parameters make the same groups, and train to the same weights, under every layout."""

import functools
import re

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from lightning_megatron import GPTModule, LRSchedule, ParameterGroups, biases_and_vectors
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import trainer

ROWS, STEPS = 8, 6
CONFIG = plain_gpt.GPT2
ADAM = {**plain_gpt.ADAM, "lr": 1e-2}


def slow(name: str, parameter: torch.nn.Parameter) -> bool:
    """The embedding, which the last stage has a copy of, and layers of two stages and chunks."""
    return "word_embeddings" in name or (re.search(r"layers\.(1|6)\.", name) is not None and parameter.dim() == 2)


GROUPS = ParameterGroups(
    functools.partial(torch.optim.AdamW, **ADAM), no_weight_decay=biases_and_vectors, scale_lr=slow, lr_mult=0.25
)
SCHEDULE = LRSchedule(
    "cosine",
    warmup_steps=2,
    decay_steps=8,
    min_lr=1e-3,
    weight_decay_style="linear",
    start_weight_decay=0.1,
    end_weight_decay=0.9,
)


class Grouped(LoadedGPT):
    configure_optimizers = GPTModule.configure_optimizers


def _train(layout: Layout) -> dict:
    module = Grouped(CONFIG, optimizer=GROUPS, lr_schedule=SCHEDULE)
    run = trainer(layout, max_steps=STEPS)
    samples = Rows(text_samples(CONFIG, ROWS * STEPS))
    sampler = torch.utils.data.DistributedSampler(samples, layout.dp, run.strategy.data_parallel_rank, shuffle=False)
    run.fit(module, torch.utils.data.DataLoader(samples, batch_size=ROWS // layout.dp, sampler=sampler))
    return {
        "groups": {name: sorted(members) for name, members in GROUPS.split(module.named_shards()).items()},
        "names": [group["name"] for group in run.strategy.optimizers[0].param_groups],
        "values": [(group["lr"], group["weight_decay"]) for group in run.strategy.optimizers[0].param_groups],
        "weights": {name: (p.detach(), getattr(p, "partition_dim", -1)) for name, p in module.named_shards()},
        "tp_rank": run.strategy.tensor_parallel_rank,
    }


@functools.cache
def truth() -> dict:
    """Plain torch with the same groups, under megatron-core's own scheduler."""
    weights = {name: torch.nn.Parameter(w.clone()) for name, w in plain_gpt.initial_weights(CONFIG).items()}
    groups: dict[str, list[str]] = {
        "default": [],
        "no_weight_decay": [],
        "scaled_lr": [],
        "scaled_lr_no_weight_decay": [],
    }
    for name, w in weights.items():
        plain = name.endswith(".bias") or w.dim() == 1
        groups["_".join(["scaled_lr"] * slow(name, w) + ["no_weight_decay"] * plain) or "default"].append(name)
    lr = ADAM["lr"]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [weights[name] for name in names],
                "max_lr": lr * (0.25 if "scaled" in group else 1),
                "min_lr": 1e-3 * (0.25 if "scaled" in group else 1),
                "wd_mult": 0.0 if "no_" in group else 1.0,
            }
            for group, names in groups.items()
        ],
        **ADAM,
    )
    scheduler = OptimizerParamScheduler(optimizer, 0.0, lr, 1e-3, 2, 8, "cosine", 0.1, 0.9, 8, "linear")
    samples = text_samples(CONFIG, ROWS * STEPS)
    for batch in plain_gpt.batches(samples, ROWS, STEPS):
        optimizer.zero_grad()
        plain_gpt.mean_loss(CONFIG, weights, batch).backward()
        optimizer.step()
        scheduler.step(1)
    values = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    return {"groups": groups, "values": values, "weights": {name: w.detach() for name, w in weights.items()}}


LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(pp=2, vp=2), Layout(dp=2), Layout(pp=2, sharded=False)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_and_weights_are_plain_torchs(layout):
    expected = truth()
    ranks = run_in_pool(layout.world_size, _train, layout)
    for group, names in expected["groups"].items():
        assert sorted({name for rank in ranks for name in rank["groups"][group]}) == sorted(names)
    trained = {name for rank in ranks for name in rank["weights"]}
    assert trained == set(expected["weights"])
    for rank in ranks:
        assert rank["names"] == list(expected["groups"])
        for seen, value in zip(rank["values"], expected["values"], strict=True):
            assert seen == pytest.approx(value, rel=1e-12)
        for name, (weight, dim) in rank["weights"].items():
            whole = expected["weights"][name]
            if weight.shape != whole.shape:
                whole = whole.chunk(layout.tp, dim)[rank["tp_rank"]]
            # Sums in another order, six steps of Adam with a large eps: some 1e-6.
            torch.testing.assert_close(weight, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arguments", [{"lr_mult": 2.0}, {"scale_lr": ["*"]}])
def test_a_factor_without_a_condition_is_refused(arguments):
    with pytest.raises(ValueError, match="Give both or neither"):
        ParameterGroups(**arguments)
