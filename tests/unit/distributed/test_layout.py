"""Sizes, rank sums and error texts of ``ParallelLayout``."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, asdict, replace
from itertools import product

import pytest
from megatron.core.parallel_state import RankGenerator

from lightning_megatron.distributed.layout import LayoutError, ParallelLayout, RankCoordinates
from lightning_megatron.distributed.model_fit import check_model

MODEL = {
    "num_layers": 8,
    "hidden_size": 96,
    "ffn_hidden_size": 384,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "vocab_size": 50257,
    "seq_length": 64,
}


def refusal(call, *args, **kwargs) -> str:
    """Return the message with which the call is refused."""
    with pytest.raises(LayoutError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def suggestions(line: str) -> list[tuple[str, int | None]]:
    """Read the values that a line of a message tells the user to take."""
    advice = line[line.rindex("Use ") :]
    found = re.findall(r"([\w=]*?)=(\d+|None)\b", advice)
    return [(name, None if value == "None" else int(value)) for name, value in found]


@pytest.mark.parametrize(
    ("world_size", "tp", "pp", "cp"),
    [
        (1, 1, 1, 1),
        (8, 2, 2, 1),
        (8, 1, 4, 1),
        (16, 4, 2, 1),
        (24, 3, 2, 1),
        (8, 2, 2, 2),
        (36, 3, 2, 2),
        (16, 2, 2, 4),
    ],
)
def test_groups_are_those_of_megatron_core(world_size, tp, pp, cp):
    layout = ParallelLayout(world_size=world_size, tp=tp, pp=pp, cp=cp)
    megatron = RankGenerator(tp=tp, ep=1, dp=layout.dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    for kind in ("tp", "pp", "dp", "cp"):
        groups = megatron.get_ranks(kind)
        assert sorted(rank for group in groups for rank in group) == list(range(world_size))
        for group in groups:
            for index, rank in enumerate(group):
                assert layout.group(kind, rank) == group
                assert asdict(layout.coordinates(rank))[kind] == index


def test_coordinates_run_from_tp_to_pp():
    layout = ParallelLayout(world_size=8, tp=2, pp=2)
    assert layout.dp == 2
    assert layout.num_model_ranks == 4
    assert layout.coordinates(1) == RankCoordinates(tp=1, cp=0, dp=0, pp=0)
    assert layout.coordinates(2) == RankCoordinates(tp=0, cp=0, dp=1, pp=0)
    assert layout.coordinates(4) == RankCoordinates(tp=0, cp=0, dp=0, pp=1)


def test_a_rank_is_named_by_the_dimensions_of_the_run():
    assert (
        ParallelLayout(world_size=8, tp=2, pp=2).rank_name(5) == "rank 5 (pipeline stage 1, tensor rank 1, replica 0)"
    )
    shares = ParallelLayout(world_size=8, tp=2, cp=2)
    assert shares.rank_name(6) == "rank 6 (pipeline stage 0, tensor rank 0, context rank 1, replica 1)"
    assert shares.sizes == "tp=2, pp=1, cp=2, dp=2"


@pytest.mark.parametrize("rank", [-1, 8])
@pytest.mark.parametrize("method", ["coordinates", "group"])
def test_rank_outside_the_world(method, rank):
    layout = ParallelLayout(world_size=8, tp=2)
    args = ("dp", rank) if method == "group" else (rank,)
    assert refusal(getattr(layout, method), *args).endswith(f"rank={rank} is not in the world of 8. Use 0 to 7.")


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        ParallelLayout(world_size=2).tp = 2


@pytest.mark.parametrize("name", ["world_size", "tp", "pp", "vp", "cp", "ep", "etp"])
@pytest.mark.parametrize("size", [0, -2, True, "2", 2.0])
def test_sizes_are_positive_integers(name, size):
    message = refusal(ParallelLayout, **{"world_size": 8, name: size})
    assert f"{name}={size!r} is not a positive integer. Use {name}=1 or more." in message


@pytest.mark.parametrize("name", ["world_size", "tp", "pp", "cp", "ep"])
def test_none_is_a_size_only_of_vp_and_etp(name):
    assert f"Use {name}=1 or more." in refusal(ParallelLayout, **{"world_size": 8, name: None})
    assert ParallelLayout(world_size=8, vp=None, etp=None).dp == 8


def test_sequence_parallel_is_a_bool():
    message = refusal(ParallelLayout, world_size=2, sequence_parallel="no")
    assert "sequence_parallel='no' is not a bool. Use True or False." in message


def test_experts_are_divided_over_the_ranks_of_a_stage():
    layout = ParallelLayout(world_size=16, tp=2, pp=2, ep=2, sequence_parallel=True)
    assert (layout.expert_tp, layout.expert_dp, layout.experts_are_divided) == (2, 2, True)
    assert not ParallelLayout(world_size=8, tp=2).experts_are_divided
    assert ParallelLayout.of_smallest_world(tp=2, pp=2, ep=4, etp=1).world_size == 8
    message = refusal(ParallelLayout, world_size=8, tp=2, ep=3)
    assert "etp=2 × ep=3 ranks do not divide the 8 ranks of a pipeline stage. Use ep=2 or ep=4" in message


def test_sizes_of_experts_must_divide():
    experts = {"num": 6, "ffn_hidden_size": 20, "shared_ffn_hidden_size": None}
    check_model(ParallelLayout(world_size=8, ep=2, etp=4), **MODEL, experts=experts)
    message = refusal(check_model, ParallelLayout(world_size=8, ep=4), **MODEL, experts=experts)
    assert "Experts.num=6 is not a multiple of ep=4. Use Experts.num=4 or Experts.num=8, or ep=2." in message
    message = refusal(check_model, ParallelLayout(world_size=8, ep=2), **MODEL)
    assert "ep and etp divide experts, and this model has none. Use ep=1 and etp=None." in message


def test_vp_one_is_none():
    message = refusal(ParallelLayout, world_size=4, pp=2, vp=1)
    assert "vp=1" in message
    assert suggestions(message) == [("vp", None)]


@pytest.mark.parametrize(
    ("world_size", "tp", "expected"),
    [(4, 1, [("pp", 2), ("vp", None)]), (9, 1, [("pp", 3), ("vp", None)]), (4, 4, [("vp", None)])],
)
def test_vp_needs_pp(world_size, tp, expected):
    message = refusal(ParallelLayout, world_size=world_size, tp=tp, vp=2)
    assert "vp=2 interleaves pipeline stages, but pp=1." in message
    assert suggestions(message) == expected
    for name, size in expected:
        ParallelLayout(**{"world_size": world_size, "tp": tp, "vp": 2, name: size})


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_sequence_parallel_needs_tp_to_do_anything(sequence_parallel, tp):
    layout = ParallelLayout(world_size=2, tp=tp, sequence_parallel=sequence_parallel)
    assert layout.uses_sequence_parallel is (sequence_parallel and tp == 2)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (
            {"world_size": 16, "tp": 4, "pp": 3},
            "MegatronStrategy(tp=4, pp=3): 4 × 3 = 12 ranks do not divide the world of 16. "
            "Use pp=2 or pp=4, or 12 or 24 devices.",
        ),
        (
            {"world_size": 8, "tp": 3},
            "MegatronStrategy(tp=3): 3 ranks do not divide the world of 8. Use tp=2 or tp=4, or 6 or 9 devices.",
        ),
        (
            {"world_size": 8, "tp": 3, "pp": 3, "vp": 2},
            "MegatronStrategy(tp=3, pp=3, vp=2): 3 × 3 = 9 ranks do not divide the world of 8. Use 9 devices.",
        ),
    ],
)
def test_world_error_text(sizes, text):
    assert refusal(ParallelLayout, **sizes) == text


def test_suggested_worlds_and_sizes_work():
    refused = 0
    for world_size, tp, pp, cp, vp in product(range(1, 25), range(1, 7), range(1, 7), (1, 2), (None, 2)):
        if world_size % (tp * pp * cp) == 0 or (vp and pp == 1):
            continue
        sizes = {"world_size": world_size, "tp": tp, "pp": pp, "cp": cp, "vp": vp}
        message = refusal(ParallelLayout, **sizes)
        assert f"the world of {world_size}" in message
        worlds = re.findall(r"\d+", re.search(r"([\d or]+) devices", message)[1])
        for name, size in [*suggestions(message), *(("world_size", int(world)) for world in worlds)]:
            ParallelLayout(**{**sizes, name: size})
            between = range(min(size, sizes[name]) + 1, max(size, sizes[name]))
            assert all(refusal(ParallelLayout, **{**sizes, name: nearer}) for nearer in between)
        refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    "sizes",
    [{}, {"tp": 8}, {"pp": 2, "vp": 4}, {"tp": 2, "pp": 2, "vp": 2, "sequence_parallel": True}],
    ids=str,
)
def test_model_fits(sizes):
    check_model(ParallelLayout(world_size=8, **sizes), **MODEL)


@pytest.mark.parametrize(
    ("sizes", "change", "line"),
    [
        (
            {"tp": 8},
            {"hidden_size": 100, "num_attention_heads": 20, "num_query_groups": 20},
            "hidden_size=100 is not a multiple of tp=8. Use hidden_size=80 or hidden_size=120, or tp=4.",
        ),
        (
            {},
            {"hidden_size": 100},
            "hidden_size=100 is not a multiple of num_attention_heads=16. Use hidden_size=96 or hidden_size=112.",
        ),
        (
            {"tp": 4},
            {"ffn_hidden_size": 98},
            "ffn_hidden_size=98 is not a multiple of tp=4. Use ffn_hidden_size=96 or ffn_hidden_size=100, or tp=2.",
        ),
        (
            {"tp": 4},
            {"num_attention_heads": 6, "num_query_groups": 6},
            "num_attention_heads=num_query_groups=6 is not a multiple of tp=4. "
            "Use num_attention_heads=num_query_groups=4 or num_attention_heads=num_query_groups=8, or tp=2.",
        ),
        (
            {"tp": 8},
            {"num_query_groups": 4},
            "num_query_groups=4 is not a multiple of tp=8. Use num_query_groups=8, or tp=4.",
        ),
        (
            {},
            {"hidden_size": 100, "num_attention_heads": 24, "num_query_groups": 5},
            "hidden_size=100 is not a multiple of num_attention_heads=24. "
            "Use hidden_size=96 or hidden_size=120, or num_attention_heads=20 or num_attention_heads=25.",
        ),
        (
            {},
            {"num_query_groups": 5},
            "num_attention_heads=16 is not a multiple of num_query_groups=5. "
            "Use num_query_groups=4 or num_query_groups=8.",
        ),
        (
            {"pp": 4},
            {"num_layers": 6},
            "num_layers=6 is not a multiple of pp=4. "
            "Use num_layers=4 or num_layers=8, or pp=2, or layers_per_stage=[2, 2, 1, 1].",
        ),
        (
            {"pp": 2, "vp": 3},
            {"num_layers": 8},
            "num_layers=8 is not a multiple of pp=2 × vp=3. "
            "Use num_layers=6 or num_layers=12, or layers_per_stage=[2, 2, 1, 1, 1, 1].",
        ),
        (
            {"tp": 4, "sequence_parallel": True},
            {"seq_length": 30},
            "seq_length=30 is not a multiple of tp=4 under sequence_parallel. "
            "Use seq_length=28 or seq_length=32, or tp=2.",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_model_error_lines(sizes, change, line):
    message = refusal(check_model, ParallelLayout(world_size=8, **sizes), **{**MODEL, **change})
    assert line in message


def test_all_violations_come_at_once():
    layout = ParallelLayout(world_size=16, tp=4, pp=4, sequence_parallel=True)
    model = {**MODEL, "num_layers": 6, "ffn_hidden_size": 98, "num_query_groups": 2, "seq_length": 30}
    first, *lines = refusal(check_model, layout, **model).splitlines()
    assert first == "MegatronStrategy(tp=4, pp=4, sequence_parallel=True): the model does not fit."
    assert sorted(line.split("=")[0].strip() for line in lines) == [
        "ffn_hidden_size",
        "num_layers",
        "num_query_groups",
        "seq_length",
    ]


def test_model_sizes_are_positive_and_all_named():
    message = refusal(check_model, ParallelLayout(world_size=1), **{**MODEL, "num_layers": 0, "vocab_size": -1})
    assert "num_layers=0 is not a positive integer. Use num_layers=1 or more." in message
    assert "vocab_size=-1 is not a positive integer. Use vocab_size=1 or more." in message


def test_uneven_stages_and_unknown_lengths_are_left_unchecked():
    layout = ParallelLayout(world_size=8, tp=2, pp=4, sequence_parallel=True)
    check_model(layout, **{**MODEL, "num_layers": 6, "seq_length": None, "vocab_size": None}, uneven_stages=True)


def test_context_parallelism_pads_rows_of_any_length():
    layout = ParallelLayout(world_size=8, tp=4, cp=2, sequence_parallel=True)
    check_model(layout, **{**MODEL, "seq_length": 36})


MODEL_LOOPS = {
    "num_layers": range(1, 20),
    "hidden_size": range(1, 200, 7),
    "ffn_hidden_size": range(1, 40),
    "num_attention_heads": range(1, 100, 3),
    "num_query_groups": range(1, 20),
    "seq_length": range(1, 40),
}


@pytest.mark.parametrize("name", MODEL_LOOPS)
@pytest.mark.parametrize(
    "sizes", [{}, {"tp": 2}, {"tp": 8}, {"tp": 3, "sequence_parallel": True}, {"pp": 4}, {"pp": 2, "vp": 3}], ids=str
)
def test_suggested_models_and_layouts_mend_their_line(name, sizes):
    layout = ParallelLayout(world_size=48, **sizes)
    for size in MODEL_LOOPS[name]:
        model = {**MODEL, name: size}
        try:
            check_model(layout, **model)
        except LayoutError as error:
            lines = str(error).splitlines()[1:]
        else:
            continue
        for line in lines:
            offers = suggestions(line)
            assert offers, line
            for offer, value in offers:
                if offer in ("tp", "pp"):
                    remaining = _refused_lines(replace(layout, **{offer: value}), model)
                    assert not any(f"{offer}=" in other.split(". Use")[0] for other in remaining), (line, remaining)
                else:
                    changes = dict.fromkeys(offer.split("="), value)
                    assert len(_refused_lines(layout, {**model, **changes})) < len(lines), line


def _refused_lines(layout, model) -> list[str]:
    try:
        check_model(layout, **model)
    except LayoutError as error:
        return str(error).splitlines()[1:]
    return []


@pytest.mark.parametrize(
    ("tp", "vocab_size", "divisible_by", "padded"),
    [(1, 50257, 128, 50304), (2, 50257, 128, 50432), (8, 50257, 128, 51200), (2, 256, 128, 256), (2, 257, 1, 258)],
)
def test_padded_vocab_size(tp, vocab_size, divisible_by, padded):
    layout = ParallelLayout(world_size=8, tp=tp)
    assert layout.padded_vocab_size(vocab_size, divisible_by=divisible_by) == padded


def test_padding_is_by_128_unless_said():
    assert ParallelLayout(world_size=8, tp=4).padded_vocab_size(1) == 512


@pytest.mark.parametrize("sizes", [(0, 128), (10, 0)])
def test_padding_refuses_nothing(sizes):
    assert re.search(r"(vocab_size|divisible_by)=0 is not a positive .* Use \1=1", _pad_refusal(*sizes))


def _pad_refusal(vocab_size, divisible_by) -> str:
    return refusal(ParallelLayout(world_size=1).padded_vocab_size, vocab_size, divisible_by)


PLAIN = ParallelLayout(world_size=8, pp=4)
INTERLEAVED = ParallelLayout(world_size=8, pp=4, vp=2)


def test_legal_numbers_of_microbatches():
    for n in range(1, 30):
        PLAIN.check_num_microbatches(n)
        if n % 4 == 0:
            INTERLEAVED.check_num_microbatches(n)
            continue
        message = refusal(INTERLEAVED.check_num_microbatches, n)
        assert f"num_microbatches={n} is not a multiple of pp=4, which vp=2 needs." in message
        *offers, without = suggestions(message)
        assert without == ("vp", None)
        assert [value for _, value in offers] == [value for value in (n // 4 * 4, n // 4 * 4 + 4) if value]


@pytest.mark.parametrize("layout", [PLAIN, INTERLEAVED], ids=str)
@pytest.mark.parametrize("n", [0, -4, 4.0, True])
def test_number_of_microbatches_is_positive(layout, n):
    message = refusal(layout.check_num_microbatches, n)
    assert f"num_microbatches={n!r} is not a positive integer. Use num_microbatches=" in message
    (_, value), *_ = suggestions(message)
    layout.check_num_microbatches(value)


@pytest.mark.parametrize(
    ("layout", "batch_size", "at_most", "number"),
    [(PLAIN, 12, 16, 12), (PLAIN, 12, 5, 4), (PLAIN, 7, 6, 1), (INTERLEAVED, 24, 16, 12), (INTERLEAVED, 24, 11, 8)],
)
def test_legal_num_microbatches(layout, batch_size, at_most, number):
    assert layout.legal_num_microbatches(batch_size, at_most) == number


def test_no_legal_num_microbatches():
    layout = ParallelLayout(world_size=2, pp=2, vp=2)
    message = refusal(layout.legal_num_microbatches, 3, 8)
    assert "batch_size=3 cannot be cut into at most 8 micro-batches" in message
    assert message.endswith("Use batch_size=2 or batch_size=4, or vp=None.")


def test_suggested_batches_can_be_cut():
    for batch_size, at_most in product(range(1, 30), range(1, 12)):
        if batch_size % 4 == 0 and at_most >= 4:
            assert INTERLEAVED.legal_num_microbatches(batch_size, at_most) % 4 == 0
            continue
        message = refusal(INTERLEAVED.legal_num_microbatches, batch_size, at_most)
        assert f"batch_size={batch_size}" in message
        assert f"at most {at_most}" in message
        offers = suggestions(message)
        assert offers.pop() == ("vp", None)
        limit = dict(offers).get("at_most", at_most)
        for size in [value for name, value in offers if name == "batch_size"] or [batch_size]:
            INTERLEAVED.legal_num_microbatches(size, limit)


@pytest.mark.parametrize("layout", [PLAIN, INTERLEAVED], ids=str)
def test_suggested_micro_batches_divide_the_batch(layout):
    refused = 0
    for batch_size, micro_batch_size in product(range(1, 30), range(1, 30)):
        if batch_size % micro_batch_size == 0 and batch_size // micro_batch_size % layout.microbatch_multiple == 0:
            layout.check_batch(batch_size, micro_batch_size)
            continue
        message = refusal(layout.check_batch, batch_size, micro_batch_size)
        assert f"batch_size={batch_size} is not a multiple of micro_batch_size={micro_batch_size}" in message
        offers = suggestions(message)
        assert offers
        for name, value in offers:
            layout.check_batch(**{"batch_size": batch_size, "micro_batch_size": micro_batch_size, name: value})
        refused += 1
    assert refused > 100


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_batches_are_positive(sizes):
    assert "batch_size=0 is not a positive integer. Use " in refusal(PLAIN.check_batch, *sizes)
    assert "=0 is not a positive integer. Use " in refusal(PLAIN.legal_num_microbatches, *sizes)
