"""The masking collator's rates, against the paper's.

With 40,000 tokens and a share p, the standard deviation of what is counted is sqrt(p (1 - p) / n): 0.002 for the 15 %,
0.006 among the 6,000 chosen for the 80 and 0.004 for the 10 %. The bands are four of them.
"""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast

from lightning_megatron import BertConfig, BertModule
from lightning_megatron.data import MaskedLMCollator

VOCAB, MASK, PAD, CLS = 211, 3, 0, 1
CONTINUATIONS = range(150, 211)


def samples(rows: int = 400, length: int = 101) -> list[dict]:
    g = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.cat([torch.tensor([CLS]), torch.randint(4, VOCAB, (length - 1 - i % 7,), generator=g)])}
        for i in range(rows)
    ]


def collator(**options) -> MaskedLMCollator:
    return MaskedLMCollator(VOCAB, MASK, PAD, special_ids=[CLS], **options)


def original(rows: list[dict], length: int = 101) -> torch.Tensor:
    return torch.stack([torch.nn.functional.pad(r["input_ids"], (0, length - len(r["input_ids"]))) for r in rows])


@pytest.mark.parametrize("words", [None, CONTINUATIONS], ids=["tokens", "whole words"])
def test_rates(words):
    rows = samples()
    batch, ids = collator(continuation_ids=words)(rows), original(rows)
    ordinary = (ids != PAD) & (ids != CLS)
    chosen = batch["labels"] != -100
    assert not (chosen & ~ordinary).any()
    # Words of several tokens are chosen together, which widens the band.
    assert float(chosen.sum() / ordinary.sum()) == pytest.approx(0.15, abs=0.008 if words is None else 0.012)
    assert torch.equal(batch["labels"][chosen], ids[chosen])
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])
    masked = batch["input_ids"][chosen] == MASK
    kept = batch["input_ids"][chosen] == ids[chosen]
    assert float(masked.float().mean()) == pytest.approx(0.8, abs=0.024)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.016)
    drawn = batch["input_ids"][chosen][~masked & ~kept]
    assert float(len(drawn) / chosen.sum()) == pytest.approx(0.1, abs=0.016)
    assert drawn.min() >= 2
    assert drawn.max() > 200
    assert not ((drawn == MASK) | (drawn == CLS)).any()
    assert float(drawn.float().mean()) == pytest.approx(VOCAB / 2, abs=4 * 61 / len(drawn) ** 0.5)


def test_words_are_chosen_whole():
    rows = samples()
    ids = original(rows)
    goes_on = torch.zeros_like(ids, dtype=torch.bool)
    goes_on[:, 2:] = (ids[:, 2:] >= CONTINUATIONS[0]) & (ids[:, 1:-1] != CLS)
    chosen = collator(continuation_ids=CONTINUATIONS)(rows)["labels"] != -100
    assert torch.equal(chosen[goes_on], chosen.roll(1, 1)[goes_on])
    assert chosen[goes_on].any()
    one_by_one = collator()(rows)["labels"] != -100
    assert not torch.equal(one_by_one[goes_on], one_by_one.roll(1, 1)[goes_on])


def test_seeds():
    rows = samples(8)
    first, again, other = collator(), collator(), collator(seed=1)
    batches = [first(rows), first(rows)]
    assert torch.equal(batches[0]["labels"], again(rows)["labels"])
    assert not torch.equal(batches[0]["labels"], batches[1]["labels"])  # masked anew
    assert not torch.equal(batches[0]["labels"], other(rows)["labels"])
    same_place = [{"input_ids": row["input_ids"].clone()} for row in rows]
    same_place[0]["input_ids"][1] += 1
    labels = collator()(same_place)["labels"]
    assert not torch.equal(labels != -100, batches[0]["labels"] != -100)  # another replica's batch, another mask


def test_workers_mask_anew_in_each_epoch_and_by_the_global_seed():
    def epochs(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        loader = DataLoader(samples(8), batch_size=4, num_workers=2, collate_fn=collator())
        return [torch.cat([batch["labels"] for batch in loader]) for _ in range(2)]

    first, again, other = epochs(5), epochs(5), epochs(6)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_other_keys_and_padding():
    rows = [
        {"input_ids": [1, 5, 6, 7], "token_type_ids": [0, 0, 1, 1], "next_sentence_label": 1, "offsets": [1, 2]},
        {"input_ids": [1, 5], "token_type_ids": [0, 1], "next_sentence_label": 0},
    ]
    batch = collator(pad_to_multiple_of=3)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert batch["next_sentence_label"].tolist() == [1, 0]


def test_a_tokenizer_gives_the_ids():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##ed", "a", "game"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    made = MaskedLMCollator.from_tokenizer(tokenizer, whole_words=True, probability=0.5)
    assert made.continuation_ids.tolist() == [6, 7]
    labels = made([tokenizer("playing a played game")] * 200)["labels"]
    assert torch.equal(labels[:, 1] != -100, labels[:, 2] != -100)
    assert not torch.equal(labels[:, 2] != -100, labels[:, 3] != -100)
    assert (labels[:, [0, -1]] == -100).all()


def test_refusals():
    with pytest.raises(ValueError, match="probability=0"):
        collator(probability=0)
    with pytest.raises(ValueError, match="shares that sum to 1"):
        collator(mask_share=0.8, random_share=0.3)
    with pytest.raises(ValueError, match="mask_id=211"):
        MaskedLMCollator(VOCAB, VOCAB)
    plain = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5})
    with pytest.raises(ValueError, match="'##' before any piece"):
        MaskedLMCollator.from_tokenizer(plain, whole_words=True)


def test_texts_of_a_row_keep_their_numbers_and_borders():
    sizes = [[3, 4], [2, 2, 5]]
    rows = [
        {
            "input_ids": torch.arange(10, 10 + sum(each)),
            "seq_idx": torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each)),
            "cu_seqlens": [0, *torch.tensor(each).cumsum(0).tolist()],
        }
        for each in sizes
    ]
    batch = collator(pad_to_multiple_of=4)(rows)
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 9]
    assert batch["seq_idx"].tolist() == [[0] * 3 + [1] * 4 + [2] * 5, [0] * 2 + [1] * 2 + [2] * 5 + [3] * 3]
    assert batch["cu_seqlens"].tolist() == [[0, 3, 7, 12, -1], [0, 2, 4, 9, 12]]
    bert = BertModule(BertConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=VOCAB, seq_length=16))
    bert.trainer = Trainer(accelerator="cpu", logger=False)
    bert.check_batch(batch)  # which refuses numbers and borders that contradict one another
    found = bert.get_batch(batch)
    assert torch.equal(found["attention_mask"].documents, batch["seq_idx"])
    assert found["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
