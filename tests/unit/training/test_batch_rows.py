"""One rule for all containers: what has rows is cut by them and joined again, and what has none goes whole."""

import collections
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from transformers import BatchEncoding

from lightning_megatron.training.batch_rows import count_rows, form_of_rows, join_rows, take_rows
from lightning_megatron.training.microbatches import MicroBatchSizes, slices

ROWS = 4
Pair = collections.namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Sample:
    ids: torch.Tensor
    name: Any


def _rows(*shape: int) -> torch.Tensor:
    return torch.arange(ROWS * int(np.prod(shape))).reshape(ROWS, *shape)


RAGGED = [torch.arange(n) for n in (ROWS, 2, ROWS + 1, 1)]  # one a row; the first is as long as there are rows

# what a batch may hold, and its second half
HALVES: dict[str, tuple[Any, Any]] = {
    "tensor": (_rows(3), _rows(3)[2:]),
    "numpy": (_rows(3).numpy(), _rows(3).numpy()[2:]),
    "numpy strings": (np.array(list("abcd")), np.array(["c", "d"])),
    "tuple of strings": (("a", "b", "c", "d"), ("c", "d")),
    "list of numbers": ([1, 2, 3, 4], [3, 4]),
    "tuple of numbers": ((1.0, 2.0, 3.0, 4.0), (3.0, 4.0)),
    "lists of tokens": ([[1, 2], [3], [4, 5, 6, 7], []], [[4, 5, 6, 7], []]),
    "tensors, one a row": (RAGGED, RAGGED[2:]),
    "arrays, one a row": ([x.numpy() for x in RAGGED], [x.numpy() for x in RAGGED[2:]]),
    "dicts, one a row": ([{"boxes": x} for x in RAGGED], [{"boxes": x} for x in RAGGED[2:]]),
    "fields in a list": ([_rows(2), _rows(5), "note"], [_rows(2)[2:], _rows(5)[2:], "note"]),
    "fields in a tuple": ((_rows(2), _rows().numpy()), (_rows(2)[2:], _rows().numpy()[2:])),
    "options of texts": ([tuple("abcd"), tuple("efgh")], [("c", "d"), ("g", "h")]),
    "nested": ({"a": {"b": (_rows(1), _rows(2))}}, {"a": {"b": (_rows(1)[2:], _rows(2)[2:])}}),
    "named tuple": (Pair(_rows(2), ["a", "b", "c", "d"]), Pair(_rows(2)[2:], ["c", "d"])),
    "dataclass": (Sample(_rows(2), ("a", "b", "c", "d")), Sample(_rows(2)[2:], ("c", "d"))),
    "encoding": (BatchEncoding({"ids": _rows(2)}), BatchEncoding({"ids": _rows(2)[2:]})),
    "number": (7, 7),
    "numpy number": (np.float64(0.5), np.float64(0.5)),
    "text": ("abcd", "abcd"),
    "nothing": (None, None),
    "no dimensions": (torch.tensor(3.0), torch.tensor(3.0)),
    "numpy without dimensions": (np.array(3.0), np.array(3.0)),
}


def _equal(mine: Any, other: Any) -> bool:
    if isinstance(other, torch.Tensor | np.ndarray):
        return type(mine) is type(other) and bool(np.array_equal(np.asarray(mine), np.asarray(other)))
    if type(mine) is not type(other):
        return False
    if isinstance(other, dict | BatchEncoding):
        return list(mine) == list(other) and all(_equal(mine[name], other[name]) for name in other)
    if isinstance(other, list | tuple):
        return len(mine) == len(other) and all(map(_equal, mine, other))
    return _equal(vars(mine), vars(other)) if isinstance(other, Sample) else mine == other


@pytest.mark.parametrize("kind", HALVES)
def test_rows_are_cut_and_joined(kind):
    whole, half = HALVES[kind]
    batch = {"x": whole, "tokens": _rows(6)}
    parts = [part for part, _ in slices(batch, MicroBatchSizes((2, 2)))]
    assert _equal(parts[1], {"x": half, "tokens": _rows(6)[2:]}), parts[1]
    assert _equal(join_rows(parts, [2, 2]), batch)


def test_packed_sparse_and_nested_tensors_are_cut_by_their_rows():
    packed = pack_sequence(RAGGED, enforce_sorted=False)
    sparse = torch.eye(ROWS).to_sparse()
    nested = torch.nested.as_nested_tensor([x.float() for x in RAGGED], layout=torch.jagged)
    compressed = torch.eye(ROWS).to_sparse_csr()
    half = take_rows({"p": packed, "s": sparse, "n": nested, "c": compressed}, 2, 4, ROWS)
    assert _equal(unpack_sequence(half["p"]), RAGGED[2:])
    assert _equal(half["s"].to_dense(), torch.eye(ROWS)[2:])
    assert _equal(half["c"].to_dense(), torch.eye(ROWS)[2:])
    assert _equal(list(half["n"].unbind()), [x.float() for x in RAGGED[2:]])


# what no rule fits, and how it is named
MISFITS: dict[str, tuple[Any, str]] = {
    "tensor": (torch.zeros(3, 2), r"batch\['x'\] is a Tensor of shape \(3, 2\), and the batch has 4 rows"),
    "numpy": (np.zeros(5), r"batch\['x'\] is a ndarray of shape \(5,\)"),
    "list": ([224, 224], r"batch\['x'\] is a list of 2 elements"),
    "list in a list": ([[1, 2], [3]], r"batch\['x'\]\[0\] is a list of 2 elements"),
    "too few": (RAGGED[1:], r"batch\['x'\]\[0\] is a Tensor of shape \(2,\)"),
    "set": ({1, 2, 3, 4}, r"batch\['x'\] is a set, whose rows cannot be determined"),
    "object": (type("Boxes", (), {"__init__": lambda s: setattr(s, "t", torch.zeros(4))})(), "is a Boxes, whose rows"),
    "fields or rows": ([torch.zeros(4)] * 4, "It may be a list of 4 fields, or of one element for each row"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_no_rule_fits_is_named(kind):
    misfit, message = MISFITS[kind]
    with pytest.raises(ValueError, match=message):
        take_rows({"tokens": _rows(6), "x": misfit}, 0, 2, ROWS)


def test_rows_are_counted_outside_of_lists_first():
    assert count_rows({"boxes": RAGGED[1:], "tokens": _rows(2)}) == ROWS
    assert count_rows({"flag": torch.tensor(1), "x": np.zeros((5, 2))}) == 5
    assert count_rows([_rows(2), {"y": _rows()}]) == ROWS
    assert count_rows({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]}) == 2
    assert count_rows([{"x": torch.zeros(3)}, {"x": torch.zeros(5)}]) == 2  # samples that nobody collated
    assert count_rows({"x": torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1), (6,))}) == 6
    pair = {"pair": [torch.zeros(7), torch.zeros(7)]}
    assert count_rows(pair) == 7  # as Lightning counts; two fields, or two samples
    with pytest.raises(ValueError, match="are ambiguous: its lists have 2 elements, and the tensors in them 7 rows"):
        take_rows(pair, 0, 3, 7)
    for empty in ({}, {"x": torch.zeros(0, 3)}, [], {"x": torch.tensor(1.0)}):
        with pytest.raises(ValueError, match="is empty, or nothing in it has rows"):
            count_rows(empty)


def test_the_fields_of_a_batch_that_is_a_list_are_fields_though_there_be_as_many_as_rows():
    batch = [torch.arange(2), ("a", "b")]
    assert _equal(take_rows(batch, 1, 2, 2), [torch.tensor([1]), ("b",)])


# what is returned for parts of 2 and 2 rows, and what one step would have returned for all 4
RETURNED: dict[str, tuple[list[Any], Any]] = {
    "texts": ([["a", "b"], ["c", "d"]], ["a", "b", "c", "d"]),
    "more texts than rows": ([["a", "b", "c"], ["d"]], ["a", "b", "c", "d"]),
    "none": ([None, None], None),
    "one text": (["a", "a"], "a"),
    "unlike numbers": ([1.0, 2.0], [1.0, 2.0]),
    "logits and labels": ([(_rows()[:2], _rows(2)[:2]), (_rows()[2:], _rows(2)[2:])], (_rows(), _rows(2))),
    "unlike widths": ([torch.ones(2, 3), torch.ones(2, 5)], [torch.ones(2, 3), torch.ones(2, 5)]),
    "dict": ([{"t": ["a", "b"], "n": 3}, {"t": ["c", "d"], "n": 3}], {"t": ["a", "b", "c", "d"], "n": 3}),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_what_steps_return_is_joined_as_if_returned_for_the_whole_batch(kind):
    parts, whole = RETURNED[kind]
    assert _equal(join_rows(parts, [2, 2]), whole)


def test_what_can_be_put_into_the_samples_order():
    form = form_of_rows({"a": _rows(2), "b": [*"abcd"], "c": (_rows(), np.zeros(4)), "d": None}, ROWS)
    assert form == form_of_rows({"a": _rows(2), "b": [*"efgh"], "c": (_rows(), np.ones(4)), "d": None}, ROWS)
    assert form != form_of_rows({"a": _rows(3), "b": [*"efgh"], "c": (_rows(), np.ones(4)), "d": None}, ROWS)
    assert form_of_rows({"a": _rows(2), "loss": torch.tensor(1.0)}, ROWS) is None
    assert form_of_rows([], ROWS) is None
