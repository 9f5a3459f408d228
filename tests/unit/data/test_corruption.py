"""Span corruption and sentence pairs: the papers' rates, nothing lost, and every mistake named."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from lightning_megatron.data import MaskedLMCollator, SentencePairCollator, SpanCorruptionCollator

EOS, PAD = 1, 0
SENTINELS = list(range(300, 200, -1))  # T5's count downwards, too
CLS, SEP, MASK = 1, 2, 3


def texts(rows: int, length: int) -> list[dict]:
    g = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(2, 200, (length,), generator=g)} for _ in range(rows)]


def restored(inputs: list[int], labels: list[int]) -> list[int]:
    """The text of before: each sentinel of the inputs replaced by what the labels have behind it."""
    spans: dict[int, list[int]] = {}
    for id_ in labels:
        if id_ in SENTINELS:
            spans[id_] = []
        elif id_ not in (EOS, -100):
            spans[list(spans)[-1]].append(id_)
    return [out for id_ in inputs if id_ not in (EOS, PAD) for out in spans.get(id_, [id_])]


def test_t5s_own_lengths():
    """568 tokens make 512 of inputs and 114 of targets, in T5's own configuration (15 %, spans of 3, eos on both)."""
    batch = SpanCorruptionCollator(SENTINELS, seq_length=568)(texts(3, 700))
    assert batch["input_ids"].shape == (3, 512)
    assert batch["labels"].shape == (3, 114)
    assert batch["attention_mask"].all()


@pytest.mark.parametrize(("density", "span"), [(0.15, 3.0), (0.5, 3.0), (0.15, 10.0)])
def test_rates_and_nothing_lost(density, span):
    rows = texts(200, 120)
    collator = SpanCorruptionCollator(SENTINELS, 120, noise_density=density, mean_span_length=span)
    batch = collator(rows)
    taken = torch.zeros(120)
    spans = 0
    for row, inputs, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        text = row["input_ids"].tolist()
        assert restored(inputs, labels) == text
        used = [id_ for id_ in inputs if id_ in SENTINELS]
        assert used == SENTINELS[: len(used)]
        assert used == [id_ for id_ in labels if id_ in SENTINELS]
        spans += len(used)
        place = 0
        of = {s: labels[labels.index(s) + 1 :] for s in used}
        for id_ in inputs[: inputs.index(EOS)]:
            if id_ in SENTINELS:
                stop = next(n for n, x in enumerate(of[id_]) if x in SENTINELS or x == EOS)
                taken[place : place + stop] += 1
                place += stop
            else:
                place += 1
    noise = round(120 * density)
    assert taken.sum() == 200 * noise  # the amounts are exact, as in T5's code; the places are random
    assert spans == 200 * round(noise / span)
    if span == 3:  # with two long spans, of which one is at the end, the places are not even
        # 60 positions away from the ends, of 200 samples. A span's tokens fall together, so the standard deviation of
        # the mean is sqrt(p (1 - p) span / 12000); the band is four of them.
        middle = taken[30:90].mean() / 200
        assert float(middle) == pytest.approx(density, abs=4 * (density * (1 - density) * span / 12000) ** 0.5)


def test_seeds_and_replicas():
    rows = texts(4, 60)
    make = lambda **options: SpanCorruptionCollator(SENTINELS, 60, **options)  # noqa: E731
    first = make()
    batches = [first(rows), first(rows)]
    assert torch.equal(batches[0]["labels"], make()(rows)["labels"])  # a model-parallel peer
    assert not torch.equal(batches[0]["labels"], batches[1]["labels"])  # anew
    assert not torch.equal(batches[0]["labels"], make(seed=1)(rows)["labels"])

    def epochs(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        loader = DataLoader(rows, batch_size=2, num_workers=1, collate_fn=make())
        return [torch.cat([batch["labels"] for batch in loader]) for _ in range(2)]

    again = epochs(5)
    assert torch.equal(again[0], epochs(5)[0])
    assert not torch.equal(again[0], again[1])


def test_short_and_ragged_samples():
    collator = SpanCorruptionCollator(SENTINELS, 60, pad_to_multiple_of=8)
    batch = collator([{"input_ids": [5, 6]}, {"input_ids": [*range(10, 50), EOS]}])
    assert batch["input_ids"].shape[1] % 8 == batch["labels"].shape[1] % 8 == 0
    assert batch["input_ids"][0, :4].tolist() == [5, 300, EOS, PAD]
    assert batch["labels"][0, :4].tolist() == [300, 6, EOS, -100]
    assert batch["attention_mask"][0].sum() == 3
    assert (batch["input_ids"][1] == EOS).sum() == 1


def t5_tokenizer(sentinels: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = ["<pad>", "</s>", "<unk>", "a", "b", *(f"<extra_id_{n}>" for n in range(sentinels))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def test_a_t5_tokenizer_gives_the_ids():
    collator = SpanCorruptionCollator.from_tokenizer(t5_tokenizer(12), 60)
    assert collator.sentinel_ids.tolist() == list(range(5, 17))  # by number, not by name
    with pytest.raises(ValueError, match=r"0 sentinels, and a sample of seq_length=60 has 3 spans.*<extra_id_2>"):
        SpanCorruptionCollator.from_tokenizer(t5_tokenizer(0), 60)


def test_span_refusals():
    with pytest.raises(ValueError, match="2 sentinels, and a sample of seq_length=568 has 28 spans. Add 26"):
        SpanCorruptionCollator([200, 201], 568)
    with pytest.raises(ValueError, match="noise_density=0"):
        SpanCorruptionCollator(SENTINELS, 60, noise_density=0)
    with pytest.raises(ValueError, match=r"mean_span_length=0\.5"):
        SpanCorruptionCollator(SENTINELS, 60, mean_span_length=0.5)
    with pytest.raises(ValueError, match="sample 1 of this batch of 2 is an empty document"):
        SpanCorruptionCollator(SENTINELS, 60)([{"input_ids": [4, 5]}, {"input_ids": []}])
    with pytest.raises(ValueError, match="sample 0 of this batch has 1 tokens"):
        SpanCorruptionCollator(SENTINELS, 60)([{"input_ids": [4, EOS]}])


# Sentence pairs. Each token tells its document and sentence: 10 documents, 8 sentences of 3 to 9 tokens.


def documents() -> list[dict]:
    return [
        {"sentences": [[10 + 10 * document + sentence] * (3 + (document + sentence) % 7) for sentence in range(8)]}
        for document in range(10)
    ]


def pairs(**options) -> SentencePairCollator:
    masking = MaskedLMCollator(120, MASK, PAD, special_ids=[CLS, SEP], probability=options.pop("probability", 0.15))
    return SentencePairCollator(masking, CLS, SEP, **{"seq_length": 32, **options})


def segments(batch: dict, row: int) -> tuple[list[int], list[int]]:
    """The unmasked ids of both."""
    ids = torch.where(batch["labels"][row] >= 0, batch["labels"][row], batch["input_ids"][row])
    ordinary, types = ids >= 10, batch["token_type_ids"][row]
    return ids[ordinary & (types == 0)].tolist(), ids[ordinary & (types == 1)].tolist()


@pytest.mark.parametrize("negatives", ["random", "swapped"])
def test_pairs(negatives):
    collator, docs = pairs(negatives=negatives), documents()
    batches = [collator(docs) for _ in range(200)]
    labels = torch.stack([batch["next_sentence_label"] for batch in batches])
    assert float(labels.float().mean()) == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)
    chosen = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    ordinary = sum(int(((batch["labels"] >= 0) | (batch["input_ids"] >= 4)).sum()) for batch in batches)
    assert chosen / ordinary == pytest.approx(0.15, abs=0.008)
    pivots = set()
    for batch in batches[:40]:
        assert batch["input_ids"].shape[1] <= 32
        for row in range(10):
            first, second = segments(batch, row)
            assert first
            assert second
            assert (batch["input_ids"][row, 0], int((batch["input_ids"][row] == SEP).sum())) == (CLS, 2)
            assert {id_ // 10 - 1 for id_ in first} == {row}
            negative = bool(batch["next_sentence_label"][row])
            if negatives == "random" and negative:
                assert row not in {id_ // 10 - 1 for id_ in second}
            else:
                assert {id_ // 10 - 1 for id_ in second} == {row}
                assert (max(first) < min(second)) is not negative
                pivots.add(len(set(first)))
    assert pivots > {1, 2}
    assert pivots <= set(range(1, 8))


def test_pairs_are_alike_on_peers_and_anew_in_each_batch():
    collator = pairs(probability=0.01)
    one, two = collator(documents()), collator(documents())
    assert torch.equal(one["input_ids"], pairs(probability=0.01)(documents())["input_ids"])
    assert one["input_ids"].shape != two["input_ids"].shape or not torch.equal(one["input_ids"], two["input_ids"])


def test_a_bert_tokenizer_gives_the_ids():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "a", "game"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    masking = MaskedLMCollator.from_tokenizer(tokenizer, whole_words=True)
    collator = SentencePairCollator.from_tokenizer(tokenizer, 16, masking, negatives="swapped")
    batch = collator([{"sentences": [[5, 6], [7, 8]]}])
    assert batch["input_ids"][0, 0] == 2
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_pair_refusals():
    with pytest.raises(ValueError, match="seq_length=4"):
        pairs(seq_length=4)
    with pytest.raises(ValueError, match="negatives='next'"):
        pairs(negatives="next")
    with pytest.raises(ValueError, match="sep_id=9.*special_ids"):
        SentencePairCollator(MaskedLMCollator(120, MASK, special_ids=[CLS]), CLS, 9, 32)
    with pytest.raises(ValueError, match="sample 1 of this batch is an empty document"):
        pairs()([documents()[0], {"sentences": [[], []]}])
    with pytest.raises(ValueError, match="sample 0 of this batch has one sentence"):
        pairs()([{"sentences": [[5, 6]]}, documents()[0]])
    with pytest.raises(ValueError, match="batches of two or more"):
        pairs()(documents()[:1])
    with pytest.raises(ValueError, match="sample 1 of this batch of 2 is an empty document"):
        MaskedLMCollator(120, MASK)([{"input_ids": [5]}, {"input_ids": []}])
