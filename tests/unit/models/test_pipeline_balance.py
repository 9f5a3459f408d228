"""``layers_per_stage="auto"``: the slowest stage is the fastest that there can be."""

import itertools
import random
from dataclasses import replace

import pytest

from lightning_megatron import BertConfig, Experts, GPTConfig, GPTModule, LoRA, ParallelLayout, T5Config
from lightning_megatron.distributed.layout import LayoutError
from lightning_megatron.models.layer_times import layer_times
from lightning_megatron.models.pipeline_balance import Balance, LayerTimes

CONFIG = GPTConfig(
    num_layers=16, hidden_size=64, num_attention_heads=4, vocab_size=64, seq_length=32, position_embedding="rope",
    normalization="RMSNorm", bias=False,
)  # fmt: skip
LARGE = replace(CONFIG, vocab_size=3072)  # whose output layer takes as long as four layers


def auto(config, recompute=None, **sizes) -> tuple[int, ...]:
    layout = ParallelLayout.of_smallest_world(**sizes, layers_per_stage="auto")
    return config.complete_layout(layout, recompute).layers_per_stage


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_is_faster(seed):
    draw = random.Random(seed)
    layers, stages, fewest = draw.randint(4, 8), draw.randint(2, 4), draw.randint(0, 1)
    times = LayerTimes(
        layers=[draw.randint(1, 9) for _ in range(layers)],
        first=draw.randint(0, 5),
        last=draw.randint(0, 20),
        again=[draw.randint(1, 4) for _ in range(layers)],
        recomputed=draw.randint(0, 3),
    )
    balance = Balance(times, stages, fewest)
    cuts = [
        cut
        for cut in itertools.product(range(layers + 1), repeat=stages)
        if sum(cut) == layers and all(cut[:-1]) and cut[-1] >= fewest
    ]
    found = balance.cut(stages)
    assert found in cuts
    assert max(balance.stage_times(found)) == min(max(balance.stage_times(cut)) for cut in cuts)


def test_of_equally_fast_cuts_the_early_stages_keep_less():
    assert Balance(LayerTimes([1] * 14), 4).cut(4) == (2, 4, 4, 4)


@pytest.mark.parametrize(("ranks", "chunks", "last"), [(2, 2, 0), (2, 3, 4), (4, 2, 3), (4, 3, 7)])
def test_virtual_stages_are_even_over_the_ranks(ranks, chunks, last):
    """As even as layers can be that may go anywhere: they are alike here."""
    balance = Balance(LayerTimes([1] * 24, last=last), ranks * chunks)
    times = balance.stage_times(balance.cut(ranks))
    whole = [sum(times[rank::ranks]) for rank in range(ranks)]
    assert max(whole) == max(-(-(24 + last) // ranks), last + chunks - 1)


def test_a_large_vocabulary_takes_layers_from_the_last_stage():
    assert auto(CONFIG, pp=4) == (4, 4, 4, 4)
    assert auto(LARGE, pp=4) == (5, 5, 5, 1)
    assert sum(auto(LARGE, pp=2, vp=2)[1::2]) < 8 < sum(auto(LARGE, pp=2, vp=2)[::2])
    assert auto(replace(LARGE, vocab_size=65536), pp=4)[-1] == 0, "the output layer is slower than all others together"


def test_layers_that_are_computed_again_are_slower():
    times, again = (layer_times(LARGE, recompute)[0] for recompute in (None, "full"))
    balance = [Balance(each, 2).stage_times([16, 0]) for each in (times, again)]
    assert balance[1][0] == pytest.approx(4 / 3 * balance[0][0])
    assert balance[1][1] == balance[0][1]
    assert auto(LARGE, "full", pp=2) != auto(LARGE, pp=2)


def test_experts_and_windows_count_where_they_are():
    experts = Experts(num=8, top_k=4, layers=list(range(8, 16)))
    first, second = auto(replace(CONFIG, experts=experts), pp=2)
    assert first > second
    long = replace(CONFIG, seq_length=4096, sliding_window=16, sliding_window_layers=list(range(8)))
    assert auto(long, pp=2)[0] > auto(long, pp=2)[1]


def test_a_stage_that_only_trains_updates_has_layers():
    layout = ParallelLayout.of_smallest_world(pp=4, layers_per_stage="auto")
    config = replace(LARGE, vocab_size=65536)
    assert GPTModule(config).complete_layout(layout).layers_per_stage[-1] == 0
    assert GPTModule(config, lora=LoRA()).complete_layout(layout).layers_per_stage[-1] == 1


def test_bert_and_t5():
    sizes = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 2048, "seq_length": 32}
    assert auto(BertConfig(**sizes), pp=2) == (5, 3)
    assert auto(BertConfig(**sizes, task="sequence_classification"), pp=2) == (4, 4)
    layout = T5Config(**sizes).complete_layout(ParallelLayout(world_size=4, pp=4, layers_per_stage="auto"))
    cut, split = layout.layers_per_stage, layout.pipeline_split_rank
    assert sum(cut[:split]) == sum(cut[split:]) == 8
    assert cut[-1] == min(cut)


def test_too_few_layers():
    with pytest.raises(LayoutError, match="num_layers=2 are too few for 4 stages. Use 3 or more layers"):
        auto(replace(CONFIG, num_layers=2), pp=4)


def test_one_stage_has_all_layers():
    assert CONFIG.complete_layout(ParallelLayout(world_size=1, layers_per_stage="auto")).num_stages == 1


def test_the_estimate_counts_the_layers_of_each_stage():
    def weights(cut, **changes):
        layout = ParallelLayout(world_size=2, pp=2, layers_per_stage=cut)
        config = replace(CONFIG, tie_embeddings=False, **changes)
        return [stage.weights for stage in layout.memory(config).stages]

    first, last = weights([8, 8])
    layer = (first - weights([6, 10])[0]) / 2
    assert layer > 2 * 11 * CONFIG.hidden_size**2
    assert weights([6, 10])[1] == pytest.approx(last + 2 * layer)
    assert weights([16, 0])[1] == pytest.approx(last - 8 * layer)
    assert weights(None, extra={"num_layers_in_first_pipeline_stage": 6}) == weights([6, 10])
    with pytest.raises(LayoutError, match="cuts the pipeline otherwise, into stages of \\[6, 10\\] layers"):
        weights([5, 11], extra={"num_layers_in_first_pipeline_stage": 6})
