"""Where a T5's pipeline is split, and the weights of which its stages hold copies."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelSummary

from lightning_megatron import MegatronStrategy, T5Module
from lightning_megatron.checkpoint.tensor_shards import shard_specs
from lightning_megatron.distributed.layout import LayoutError
from tests.reference import plain_gpt, plain_t5
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.reference.parallel_t5 import LoadedT5
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.t5_split import split
from tests.support.trainer import QUIET, loader, trainer

STACKS = ("encoder", "decoder")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pp": 2, "pipeline_split_rank": 2}, "both sides of an encoder-decoder model need one.*=1"),
        ({"pp": 4, "pipeline_split_rank": 0}, "4 pipeline stages.*Use pipeline_split_rank=1 to 3"),
        ({"pp": 2, "vp": 2, "pipeline_split_rank": 4}, "4 pipeline stages.*Use pipeline_split_rank=1 to 3"),
        ({"pipeline_split_rank": 1}, "Use pp=2 or more, or leave it out"),
    ],
)
def test_a_side_without_stages_is_refused_before_a_process_starts(sizes, message):
    with pytest.raises(LayoutError, match=message):
        Trainer(accelerator="cpu", devices=4, strategy=MegatronStrategy(**sizes), **QUIET)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pp": 4, "pipeline_split_rank": 1}, "1 stages of the encoder and 3 of the decoder.*2 decoder.* Use .*2 to 3"),
        ({"pp": 5, "pipeline_split_rank": 4}, "4 stages of the encoder.* 3 encoder and 2 .* pipeline_split_rank=3,"),
        ({"pp": 6}, "too few for the 6 stages of pp=6.*at most 5 stages"),
    ],
)
def test_a_stage_without_layers_is_refused(sizes, message):
    with pytest.raises(LayoutError, match=message):
        split(plain_t5.CONFIGS["t5"], **sizes)


def _gpt(layout: Layout) -> None:
    run = trainer(layout, max_steps=1)
    run.fit(LoadedGPT(plain_gpt.GPT2), loader(Rows(text_samples(plain_gpt.GPT2, 8)), layout, 8, run))


def test_a_split_of_a_gpt_is_refused_by_name():
    with pytest.raises(RankError, match="pipeline_split_rank=1.*encoder-decoder models, and LoadedGPT is not one"):
        run_ranks(2, _gpt, Layout(pp=2, split=1), timeout=40)


def _tables(layout: Layout, steps: int) -> dict[str, list[torch.Tensor]]:
    """This rank's copies of the position bias after so many steps from weights of its own."""
    module, run = T5Module(plain_t5.CONFIGS["t5"]), trainer(layout, max_steps=steps)
    samples = plain_t5.samples("t5", 12, 1)
    run.validate(module, loader(samples, layout, 12, run), verbose=False)
    if steps:
        run.fit(module, loader(samples, layout, 12, run))
    found: dict[str, list[torch.Tensor]] = {}
    for name, weight in module.named_shards():
        if "relative" in name:
            found.setdefault(name, []).append(weight.detach().clone())
    return found


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("layout", [Layout(pp=4, split=2), Layout(pp=2, vp=2, split=3)], ids=str)
def test_stages_start_and_stay_with_the_same_position_bias(layout, steps):
    by_name: dict[str, list[torch.Tensor]] = {}
    for rank in run_in_pool(layout.world_size, _tables, layout, steps):
        for name, copies in rank.items():
            by_name.setdefault(name, []).extend(copies)
    encoder, decoder = (by_name[f"{stack}_relative_pos_emb.relative_attention_bias.weight"] for stack in STACKS)
    assert (len(encoder), len(decoder)) == (layout.split, 4 - layout.split)
    for first, *others in (encoder, decoder):
        assert first.std() > 0
        for other in others:
            assert torch.equal(first, other)


def _written(layout: Layout) -> list[str]:
    """The position biases of which this rank has the copy that a checkpoint has."""
    module, run = LoadedT5("t5"), trainer(layout)
    run.validate(module, loader(plain_t5.samples("t5", 12, 1), layout, 12, run), verbose=False)
    found = shard_specs(module).values()
    return [spec.key for spec in found if "relative" in spec.key and not any(spec.replica_id)]


@pytest.mark.parametrize("layout", [Layout(pp=4, split=2), Layout(tp=2, pp=2, vp=2, split=3)], ids=str)
def test_one_copy_is_the_one_to_write(layout):
    written = [key for rank in run_in_pool(4, _written, layout) for key in rank]
    assert sorted(written) == sorted(f"{s}_relative_pos_emb.relative_attention_bias.weight" for s in STACKS)


class Kept(ModelSummary):
    """Keeps the totals that it shows."""

    @staticmethod
    def summarize(rows: Any, total: int, trainable: int, *_: Any, **__: Any) -> None:
        Kept.totals = (total, trainable)


def _total(layout: Layout) -> tuple[int, int]:
    run = trainer(layout, max_steps=1, callbacks=[Kept()], enable_model_summary=True)
    run.fit(LoadedT5("t5"), loader(plain_t5.samples("t5", 12, 1), layout, 12, run))
    return Kept.totals if run.is_global_zero else (0, 0)


def test_the_summary_counts_copies_once():
    config = plain_t5.CONFIGS["t5"]
    weights = plain_t5.megatron_weights(plain_t5.new_model("t5"))
    padding = (-config.vocab_size % 16) * config.hidden_size  # a multiple of 8 on each tensor-parallel rank
    expected = sum(weight.numel() for weight in weights.values()) + padding
    for layout in (Layout(tp=2, pp=2), Layout(tp=2, pp=2, vp=2, split=2)):
        assert run_in_pool(4, _total, layout)[0] == (expected, expected)


def _forward(layout: Layout) -> None:
    module, run = LoadedT5("t5"), trainer(layout)
    samples = plain_t5.samples("t5", 12, 1)
    run.validate(module, loader(samples, layout, 12, run), verbose=False)
    module(input_ids=samples[0]["input_ids"][None], labels=samples[0]["labels"][None])


def test_forward_is_of_whole_models():
    with pytest.raises(RankError, match="forward needs pp=1.*trainer.predict"):
        run_ranks(2, _forward, Layout(pp=2), timeout=40)
