"""Pipelines whose stages have different numbers of layers train as one process does, and so does each other cut.

A wrong cut would train as well, so the chunks are counted, too.
"""

import functools
from dataclasses import replace

import pytest
import torch

from lightning_megatron import BertModule, GPTModule, T5Module
from tests.reference import (
    parallel_experts,
    parallel_gpt,
    parallel_vit,
    plain_bert,
    plain_experts,
    plain_gpt,
    plain_t5,
    plain_vit,
)
from tests.reference.same_training import (
    CLIP,
    ROWS,
    STEPS,
    assert_bert_trains_alike,
    assert_gpt_trained_alike,
    assert_t5_trains_alike,
)
from tests.support import train_part
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool


def cut(layers, **sizes) -> Layout:
    return Layout(**sizes, extra={"layers_per_stage": layers})


@functools.cache
def truth(name: str, steps: int = STEPS, clip: float = CLIP) -> dict:
    config = getattr(plain_gpt, name)
    return plain_gpt.train(config, parallel_gpt.text_samples(config, ROWS * steps), ROWS, steps, clip)


class CountedGPT(parallel_gpt.LoadedGPT):
    """Looks whether its chunks have the layers that the layout says."""

    def configure_model(self) -> None:
        super().configure_model()
        layout, first = self.build_settings.layout, 1
        for stage, count in enumerate(layout.layers_per_stage):
            if stage % layout.pp == self._pipeline_stage:
                numbers = [layer.layer_number for layer in self.chunks[stage // layout.pp].decoder.layers]
                assert numbers == list(range(first, first + count)), (stage, numbers)
            first += count


CUTS = [
    ("GPT2", cut([5, 3], pp=2, dp=2)),
    ("GPT2", cut([0, 3, 5, 0], pp=4)),  # the embedding and the tied output layer alone
    ("GPT2", cut([0, 3, 4, 1], pp=2, vp=2, tp=2, sp=True)),
    ("GPT2", cut([2, 6], pp=2, vp=2)),
    ("LLAMA", cut("Et|tt|t*5|L", pp=4)),
    ("LLAMA", cut("auto", pp=2, vp=2, dp=2)),
]


@pytest.mark.parametrize(("name", "layout"), CUTS, ids=lambda each: str(getattr(each, "extra", each)))
def test_gpt(name, layout):
    expected = truth(name)
    train = functools.partial(parallel_gpt.train, full=expected["weights"], kind=CountedGPT)
    ranks = run_in_pool(layout.world_size, train, getattr(plain_gpt, name), layout, ROWS, STEPS, CLIP)
    assert_gpt_trained_alike(ranks, expected)


def test_experts_and_a_dense_layer_stay_in_their_places():
    config, steps = plain_experts.ODD, parallel_experts.STEPS
    expected = plain_experts.train(config, parallel_gpt.text_samples(config, ROWS * steps), ROWS, steps, CLIP)
    train = functools.partial(parallel_experts.train, full=expected["weights"])
    layout = cut([1, 3], pp=2, dp=2, ep=2)
    assert_gpt_trained_alike(run_in_pool(4, train, config, layout, ROWS, steps, CLIP, timeout=240), expected)


def test_recomputed_layers_and_accumulated_batches():
    expected = truth("GPT2")
    train = functools.partial(
        parallel_gpt.train, full=expected["weights"], accumulate=3, recompute=2, micro_batch_size=2
    )
    ranks = run_in_pool(2, train, plain_gpt.GPT2, cut([7, 1], pp=2), ROWS, STEPS, CLIP)
    assert_gpt_trained_alike(ranks, expected, losses=False)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("pretraining", cut([0, 5, 3, 0], pp=4)), ("classes", cut([5, 1, 2, 0], pp=2, vp=2, tp=2, sp=True))],
    ids=str,
)
def test_bert(name, layout):
    assert_bert_trains_alike(name, layout)


@pytest.mark.parametrize(
    "layout", [cut([1, 2, 2], pp=3), cut([2, 1, 1, 1], pp=2, vp=2), cut("auto", pp=3)], ids=lambda each: str(each.extra)
)
def test_t5(layout):
    assert_t5_trains_alike("t5", layout)


def test_a_model_of_ones_own(tmp_path):
    expected = plain_vit.train()
    for seen in run_in_pool(2, parallel_vit.train, cut([1, 3], pp=2), str(tmp_path / "vit.ckpt")):
        assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen["distance"] < 1e-5


def layers_of(kind: type, config: object, layers: list[int] | str) -> list[str]:
    module = kind(config).build(pp=2, layers_per_stage=layers)
    return sorted({".".join(name.split(".")[:3]) for name, _ in module.named_shards() if ".layers." in name})


@pytest.mark.parametrize(
    ("kind", "config", "stacks", "layers"),
    [
        (GPTModule, plain_gpt.GPT2, ["decoder"] * 8, [2, 6]),
        (BertModule, plain_bert.CONFIGS["pretraining"], ["encoder"] * 8, [7, 1]),
        (T5Module, plain_t5.CONFIGS["t5"], ["encoder"] * 3 + ["decoder"] * 2, [3, 2]),
    ],
)
def test_the_stages_have_the_layers(kind, config, stacks, layers):
    seen = run_in_pool(2, layers_of, kind, config, layers)
    numbers = [f"{stack}.layers.{stacks[:at].count(stack)}" for at, stack in enumerate(stacks)]
    assert seen == [sorted(numbers[: layers[0]]), sorted(numbers[layers[0] :])]


def test_a_checkpoint_goes_on_under_another_cut(tmp_path):
    expected, path = truth("GPT2", train_part.STEPS, train_part.CLIP), tmp_path / "saved.ckpt"
    first, other = cut([5, 3], pp=2), cut([0, 2, 5, 1], pp=2, vp=2)
    run_in_pool(2, functools.partial(train_part.train_part, save=path), plain_gpt.GPT2, first, 3)
    for layout in (other, Layout(pp=2), Layout(tp=2)):
        run = functools.partial(train_part.train_part, load=path, full=expected["weights"])
        for seen in run_in_pool(2, run, plain_gpt.GPT2, layout, train_part.STEPS):
            assert seen["losses"] == pytest.approx(expected["losses"][3:], rel=1e-5)
            assert seen["distance"] < 1e-5


def generated_and_exported(layers: list[int] | None, folder: str) -> list[list[int]]:
    module = GPTModule(plain_gpt.LLAMA).build(pp=1 if layers is None else len(layers), layers_per_stage=layers)
    module.save_pretrained(folder)
    return module.generate(torch.arange(3, 13).view(2, 5), max_new_tokens=6).tolist()


def test_stages_generate_and_export_what_one_process_does(tmp_path):
    (alone,) = run_in_pool(1, generated_and_exported, None, str(tmp_path / "alone"))
    assert run_in_pool(4, generated_and_exported, [0, 3, 5, 0], str(tmp_path / "cut")) == [alone] * 4
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "cut")]
    assert written[0] == written[1]


def test_megatron_cores_own_fields_cut_the_same_way():
    expected = truth("GPT2")
    config = replace(plain_gpt.GPT2, extra={"num_layers_in_last_pipeline_stage": 2})
    train = functools.partial(parallel_gpt.train, full=expected["weights"], kind=CountedGPT)
    assert_gpt_trained_alike(run_in_pool(2, train, config, Layout(pp=2), ROWS, STEPS, CLIP), expected)
