"""Core attention against plain softmax over dense masks: documents, windows, padding, parts of rows, layout, memory.

Both sides compute in fp32 and add up the same numbers in another order: 2e-5.
"""

import math
from dataclasses import replace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_megatron.models.kernels import Kernels
from lightning_megatron.models.layers import capped_attention
from lightning_megatron.models.layers.attention import TorchAttention, pad_mask, use_kernel
from lightning_megatron.models.layers.attention_pattern import AttentionPattern, PatternParams
from lightning_megatron.models.layers.flex_attention import block_mask, capped_scores, why_not
from lightning_megatron.models.layers.sdpa import attend
from lightning_megatron.training.saved_bytes import SavedBytes

HEADS, GROUPS, SIZE = 4, 2, 8
ROWS, LENGTH = 3, 300


def attention(
    window: int | None = None,
    groups: int = GROUPS,
    dropout: float = 0.0,
    cap: float | None = None,
    cross: bool = False,
    causal: bool = True,
) -> TorchAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=dropout,
        window_size=None if window is None else (window - 1, 0 if causal else window - 1),
    )
    config.attention_score_cap = cap
    kind = (AttnMaskType.causal if causal and not cross else AttnMaskType.padding, "cross" if cross else "self")
    layer = TorchAttention(config, 1, *kind)
    layer.in_parallel_rng = True  # there is no tensor-parallel random state in this process
    return layer


def projected(length: int, rows: int, groups: int = GROUPS, heads: int = HEADS) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as megatron-core's projection leaves them, and the projection's output."""
    generator = torch.Generator().manual_seed(length)
    width = (heads // groups + 2) * SIZE
    mixed = torch.randn(length, rows, groups * width, generator=generator, requires_grad=True)
    parts = mixed.view(length, rows, groups, width).split([heads // groups * SIZE, SIZE, SIZE], dim=3)
    return parts[0].reshape(length, rows, heads, SIZE), parts[1], parts[2], mixed


def plain(query, key, value, looks: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    """``looks`` is ``[b or 1, queries, keys]``; a query that looks nowhere has zeros."""
    times = query.size(2) // key.size(2)
    key, value = (x.repeat_interleave(times, dim=2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) / math.sqrt(query.size(-1))
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~looks[:, None], -1e30)
    weights = torch.softmax(scores, dim=-1) * looks[:, None]
    return torch.einsum("bnqk,kbnd->qbnd", weights, value).flatten(2)


def documents(length: int, rows: int, longest: int) -> torch.Tensor:
    starts = torch.rand(rows, length, generator=torch.Generator().manual_seed(longest)) < 2 / longest
    return starts.cumsum(dim=1)


PLACES = torch.arange(LENGTH)
LEFT, RIGHT = (torch.tensor(n)[:, None] for n in ((0, 40, 130), (300, 222, 1)))
KEEPS = {
    "all": None,
    "padded in front": PLACES >= LEFT,
    "padded behind": PLACES < RIGHT,
    "both, and a row of padding": (PLACES >= LEFT) & (torch.tensor([280, 200, 100])[:, None] > PLACES),
    "with holes": (PLACES % torch.tensor([7, 50, 90])[:, None] != 3) & (PLACES >= LEFT),
}
DOCUMENTS = {
    "one": None,
    "short": documents(LENGTH, ROWS, 12),
    "long": documents(LENGTH, ROWS, 150),
    "mixed": torch.cat([documents(100, ROWS, 9), torch.full((ROWS, 200), 100)], dim=1),
}


def looks(pattern: AttentionPattern, window: int | None) -> torch.Tensor:
    query, key = torch.tensor(pattern.queries)[:, None], torch.arange(pattern.length)
    seen = (query - key).abs() < (window or pattern.length)
    seen = seen & (key <= query) if pattern.causal else seen
    if pattern.documents is not None:
        seen = seen & (pattern.documents[:, list(pattern.queries), None] == pattern.documents[:, None])
    if pattern.keep is not None:
        seen = seen & pattern.keep[:, None]
    return seen if seen.dim() == 3 else seen[None]


def check(layer: TorchAttention, window: int | None, pattern: AttentionPattern) -> None:
    query, key, value, mixed = projected(LENGTH, ROWS)
    query = query[pattern.queries.start : pattern.queries.stop]
    weights = torch.randn(len(query), ROWS, HEADS * SIZE, generator=torch.Generator().manual_seed(1))
    found = layer(query, key, value, packed_seq_params=PatternParams(pattern))
    expected = plain(query, key, value, looks(pattern, window), layer.score_cap)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    gradients = [torch.autograd.grad((out * weights).sum(), mixed, retain_graph=True)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 5, 90])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("apart", DOCUMENTS)
def test_patterns_are_plain_softmax_with_a_dense_mask(apart, keep, window):
    pattern = AttentionPattern(length=LENGTH, documents=DOCUMENTS[apart], keep=KEEPS[keep])
    layer = attention(window)
    check(layer, window, pattern)
    check(layer, window, pattern.part(0, 120))
    check(layer, window, pattern.part(70, 211))  # as a rank of context parallelism has them


@pytest.mark.parametrize("window", [None, 5, 90])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("apart", DOCUMENTS)
def test_patterns_of_an_encoder_are_plain_softmax_with_a_dense_mask(apart, keep, window):
    pattern = AttentionPattern(length=LENGTH, documents=DOCUMENTS[apart], keep=KEEPS[keep], causal=False)
    layer = attention(window, causal=False)
    check(layer, window, pattern)
    check(layer, window, pattern.part(0, 120))
    check(layer, window, pattern.part(70, 211))


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("apart", ["one", "mixed"])
def test_capped_scores_are_a_tanh_before_the_softmax(apart, keep, window, monkeypatch):
    monkeypatch.setattr(capped_attention, "_BLOCK", 64)
    pattern = AttentionPattern(length=LENGTH, documents=DOCUMENTS[apart], keep=KEEPS[keep])
    layer = attention(window, cap=0.4)
    check(layer, window, pattern)
    check(layer, window, pattern.part(70, 211))


def test_capped_scores_without_a_pattern_with_a_mask_and_with_dropout(monkeypatch):
    monkeypatch.setattr(capped_attention, "_BLOCK", 64)
    query, key, value, _ = projected(LENGTH, ROWS)
    seen = looks(AttentionPattern(length=LENGTH), None)
    layer = attention(cap=0.4)
    torch.testing.assert_close(layer(query, key, value), plain(query, key, value, seen, 0.4), rtol=2e-5, atol=2e-5)
    kept = seen & (torch.tensor([[[0]], [[40]], [[130]]]) <= PLACES) | torch.eye(LENGTH, dtype=torch.bool)
    expected = plain(query, key, value, kept, 0.4)
    for dropout in (0.0, 1e-12):  # another way of computing, of which this drops nothing
        layer = attention(cap=0.4, dropout=dropout)
        torch.testing.assert_close(layer(query, key, value, ~kept[:, None]), expected, rtol=2e-5, atol=2e-5)
    dropped = attention(cap=0.4, dropout=0.5)(query, key, value, ~kept[:, None])
    assert float((dropped - expected).abs().max()) > 0.1


def test_kernels_without_a_cap_are_refused():
    layers = [torch.nn.ModuleList([attention(cap=0.4)])]
    with pytest.raises(ValueError, match="attention='flash'.*no cap on the scores.*attention_score_cap=0.4.*'math'"):
        use_kernel(layers, "flash", torch.float32, torch.device("cpu"))
    use_kernel(layers, "math", torch.float32, torch.device("cpu"))


def test_documents_of_an_encoder_do_not_look_at_what_is_padded_behind_them():
    query, key, value, _ = projected(LENGTH, ROWS)
    for length in (30, 200):  # in one mask, and in pieces
        pattern = AttentionPattern(length=length, documents=DOCUMENTS["mixed"][:, :length], causal=False)
        first = [x[:length] for x in (query, key, value)]
        longer = PatternParams(pad_mask(pattern, 20, 20))
        found = attention()(*(x[: length + 20] for x in (query, key, value)), packed_seq_params=longer)[:length]
        torch.testing.assert_close(found, attention()(*first, packed_seq_params=PatternParams(pattern)))


@pytest.mark.parametrize("window", [5, 90])
def test_a_window_alone(window):
    query, key, value, mixed = projected(LENGTH, ROWS)
    expected = plain(query, key, value, looks(AttentionPattern(length=LENGTH), window))
    found = attention(window)(query, key, value)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    gradients = [torch.autograd.grad(out.square().sum(), mixed, retain_graph=True)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-4)
    last = attention(window)(query[-1:], key, value, attn_mask_type=AttnMaskType.no_mask)  # as generation asks
    torch.testing.assert_close(last, expected[-1:], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [5, 90])
def test_a_window_that_reaches_both_ways(window, monkeypatch):
    """Alone, and beside a mask of keys, which long rows make in blocks."""
    query, key, value, mixed = projected(LENGTH, ROWS)
    within, keep = looks(AttentionPattern(length=LENGTH, causal=False), window), KEEPS["both, and a row of padding"]
    for mask in (None, ~keep[:, None, None]):
        expected = plain(query, key, value, within if mask is None else within & keep[:, None])
        for at_once in (1024, 64):
            monkeypatch.setattr("lightning_megatron.models.layers.attention.AT_ONCE", at_once)
            found = attention(window, causal=False)(query, key, value, mask)
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
            both = [torch.autograd.grad(out.square().sum(), mixed, retain_graph=True)[0] for out in (found, expected)]
            torch.testing.assert_close(*both, rtol=2e-5, atol=2e-4)


def test_documents_in_a_row_are_each_document_alone():
    query, key, value, _ = projected(LENGTH, ROWS)
    pattern = AttentionPattern(length=LENGTH, documents=DOCUMENTS["long"])
    found = attention()(query, key, value, packed_seq_params=PatternParams(pattern))
    for row, numbers in enumerate(pattern.documents):
        for number in numbers.unique():
            here = (numbers == number).nonzero().flatten()
            alone = attention()(*(x[here, row : row + 1] for x in (query, key, value)))
            torch.testing.assert_close(found[here, row : row + 1], alone, rtol=2e-5, atol=2e-5)


def test_short_rows_have_one_mask():
    query, key, value, _ = projected(40, ROWS)
    pattern = AttentionPattern(length=40, documents=DOCUMENTS["short"][:, :40], keep=KEEPS["with holes"][:, :40])
    found = attention()(query, key, value, packed_seq_params=PatternParams(pattern))
    torch.testing.assert_close(found, plain(query, key, value, looks(pattern, None)), rtol=2e-5, atol=2e-5)


def test_padding_behind_changes_nothing_before_it():
    query, key, value, _ = projected(LENGTH, ROWS)
    pattern = AttentionPattern(length=200, documents=DOCUMENTS["mixed"][:, :200], keep=KEEPS["padded behind"][:, :200])
    longer = pad_mask(pattern, 100, 100)
    found = attention()(query, key, value, packed_seq_params=PatternParams(longer))[:200]
    first = (x[:200] for x in (query, key, value))
    torch.testing.assert_close(found, attention()(*first, packed_seq_params=PatternParams(pattern)))


def test_dropout_is_drawn_alike_after_the_same_seed_and_not_in_evaluation():
    query, key, value, _ = projected(LENGTH, ROWS)
    params = PatternParams(AttentionPattern(length=LENGTH, documents=DOCUMENTS["long"]))
    layer, found = attention(dropout=0.4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(layer(query, key, value, packed_seq_params=params))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    kept = attention()(query, key, value, packed_seq_params=params)
    torch.testing.assert_close(layer.eval()(query, key, value, packed_seq_params=params), kept)


CROSSING = {
    "pairs": (documents(LENGTH, ROWS, 60), documents(210, ROWS, 40)),
    "short pairs": (documents(60, ROWS, 12), documents(40, ROWS, 9)),
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", CROSSING)
def test_documents_of_a_decoder_look_at_those_of_an_encoder(name, keep):
    of_keys, of_queries = CROSSING[name]
    keys, queries = of_keys.size(1), of_queries.size(1)
    query, key, value, mixed = projected(LENGTH, ROWS)
    query, key, value = query[:queries], key[:keys], value[:keys]
    kept = None if KEEPS[keep] is None else KEEPS[keep][:, :keys]
    pattern = AttentionPattern(
        length=keys, documents=of_keys, query_documents=of_queries, keep=kept, queries=range(queries), causal=False
    )
    seen = of_queries[:, :, None] == of_keys[:, None]
    seen = seen if kept is None else seen & kept[:, None]
    layer = attention(cross=True)
    for part in (pattern, pattern.part(7, queries - 5)):
        here = slice(part.queries.start, part.queries.stop)
        found = layer(query[here], key, value, packed_seq_params=PatternParams(None, part))
        expected = plain(query[here], key, value, seen[:, here])
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
        pairs = [torch.autograd.grad(out.square().sum(), mixed, retain_graph=True)[0] for out in (found, expected)]
        torch.testing.assert_close(*pairs, rtol=2e-5, atol=2e-4)
        q, k, v = (x.detach().permute(1, 2, 0, 3) for x in (query[here], key, value))
        blocks = block_mask(part, None, torch.device("cpu"))
        eager = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
        torch.testing.assert_close(eager, expected.detach(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 90])
def test_a_large_mask_of_queries_and_keys_is_read_in_blocks(window, monkeypatch):
    query, key, value, mixed = projected(LENGTH, ROWS)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(ROWS, 1, LENGTH, LENGTH, generator=generator) < 0.3
    mask |= torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    layer, found = attention(window), []
    for at_once in (LENGTH, 10):
        monkeypatch.setattr("lightning_megatron.models.layers.attention.AT_ONCE", at_once)
        out = layer(query, key, value, mask)
        found.append((out, torch.autograd.grad(out.square().sum(), mixed, retain_graph=True)[0]))
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-4)


def test_blocks_draw_their_dropout_again_in_the_backward_pass():
    query, key, value, mixed = projected(LENGTH, ROWS)
    pattern = AttentionPattern(length=LENGTH, keep=KEEPS["with holes"])
    layer = attention(dropout=0.4)

    def loss(into: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        found = layer(into, key.detach(), value.detach(), packed_seq_params=PatternParams(pattern))
        return found.double().square().sum()

    start = query.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(start), start)
    with torch.no_grad():
        step = 1e-2 * gradient / gradient.norm()
        moved = (loss(start + step) - loss(start - step)) / 2
    assert float(moved) == pytest.approx(float((gradient * step).sum()), rel=1e-2)


class Sizes(TorchDispatchMode):
    """The elements of the largest tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


@pytest.mark.parametrize(
    ("longest", "window", "causal", "holes"),
    [
        (3000, None, True, False),
        (None, 128, True, False),
        (3000, 128, True, False),
        (3000, None, False, False),
        (3000, None, True, True),
    ],
    ids=str,
)
def test_a_row_of_32k_tokens_makes_no_tensor_of_its_square(longest, window, causal, holes):
    length = 32768
    query, key, value, _ = projected(length, 1, groups=1, heads=1)
    apart = None if longest is None else documents(length, 1, longest)
    params = None
    if longest is not None:
        keep = torch.arange(length)[None] % 7 > 0 if holes else None
        params = PatternParams(AttentionPattern(length=length, documents=apart, keep=keep, causal=causal))
    with Sizes() as sizes, SavedBytes(()) as saved:
        attention(window, groups=1)(query, key, value, packed_seq_params=params).sum().backward()
    # The projection has 3; a mask with holes is made for 256 queries and the keys of their document.
    assert sizes.largest <= (2 * 1024 * 1024 if holes else 4 * length * SIZE)
    assert saved.peak < 512 * length  # bytes; a mask of all queries and keys would be 32768 · length


@pytest.mark.parametrize("groups", [HEADS, GROUPS])
def test_nothing_is_copied(groups):
    query, key, value, _ = projected(LENGTH, ROWS, groups)
    layer = attention(groups=groups)
    layer(query, key, value)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = layer(query, key, value)
    called = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called
    assert not called & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::repeat_interleave"}
    assert found.is_contiguous()


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("apart", DOCUMENTS)
def test_masks_of_blocks_hold_what_the_kernel_must_visit(apart, keep, window):
    whole = AttentionPattern(length=LENGTH, documents=DOCUMENTS[apart], keep=KEEPS[keep])
    patterns = [whole, whole.part(150, 299)]
    if window is not None or not whole.same_rows:
        patterns += [replace(whole, causal=False), replace(whole, causal=False, queries=range(150, 299))]
    for pattern in patterns:
        found = block_mask(pattern, window, torch.device("cpu"))
        seen = looks(pattern, window)
        rows, queries = len(seen), len(pattern.queries)
        expected = create_block_mask(lambda b, h, q, k, s=seen: s[b, q, k], rows, None, queries, LENGTH, device="cpu")
        partial, full = (
            _blocks(found.kv_num_blocks, found.kv_indices),
            _blocks(found.full_kv_num_blocks, found.full_kv_indices),
        )
        wanted = _blocks(expected.kv_num_blocks, expected.kv_indices)
        wanted_full = _blocks(expected.full_kv_num_blocks, expected.full_kv_indices)
        assert not (partial & full).any()
        assert ((wanted | wanted_full) <= (partial | full)).all()  # further blocks cost time, and are masked
        assert (full <= wanted_full).all()  # in a full block nothing is masked
        query, key, value = (x.detach() for x in projected(LENGTH, ROWS)[:3])
        query = query[pattern.queries.start : pattern.queries.stop]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if rows == ROWS:
            eager = flex_attention(q, k, v, block_mask=found, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
            torch.testing.assert_close(eager, plain(query, key, value, seen), rtol=2e-5, atol=2e-5)
            capped = flex_attention(q, k, v, capped_scores(0.4), block_mask=found, enable_gqa=True)
            capped = capped.permute(2, 0, 1, 3).flatten(2)
            torch.testing.assert_close(capped, plain(query, key, value, seen, 0.4), rtol=2e-5, atol=2e-5)


def _blocks(numbers: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    dense = torch.zeros(*indices.shape, dtype=torch.bool)
    counted = torch.arange(indices.size(-1)) < numbers[..., None]
    return dense.scatter_(-1, indices.long(), counted)


def test_flex_attention_says_why_it_cannot():
    assert "trains on CUDA only" in why_not(torch.zeros(1), 0.0)
    with pytest.raises(ValueError, match=r"Kernels\(attention='flex'\) trains on CUDA only"):
        Kernels(attention="flex").on(torch.device("cpu"))
    with pytest.raises(ValueError, match="computes in bf16 and fp16, and this model in fp32.*'efficient'"):
        use_kernel([], "flash", torch.float32, torch.device("cuda"))


def test_a_back_end_that_cannot_says_why():
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(
        ValueError,
        match="attention='flash'.*float32 on 'cpu', 2 heads of 8.*0.5. torch says: .* non-zero dropout",
    ):
        attend(query, query, query, None, True, dropout=0.5, scale=None, backend="flash")


@pytest.mark.parametrize("name", ["flash", "math"])
def test_the_kernel_that_was_asked_for_computes(name):
    query, key, value, _ = projected(LENGTH, ROWS)
    layer = attention()
    use_kernel([torch.nn.ModuleList([layer])], name, torch.float32, torch.device("cpu"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = layer(query, key, value)
    called = {event.key for event in profile.key_averages()}
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in called) == (name == "flash")
    expected = plain(query, key, value, looks(AttentionPattern(length=LENGTH), None))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_windows_that_attention_does_not_have_are_refused():
    for size, kind in (((3, 0), "self"), ((3, 3), "cross")):
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, window_size=size)
        with pytest.raises(ValueError, match=f"'window_size': \\(3, {size[1]}\\)}}: .* equally far in each. Leave it"):
            TorchAttention(config, 1, AttnMaskType.padding, kind)
