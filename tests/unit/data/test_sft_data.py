"""Rows for fine-tuning hold the ids that the tokenizer gives at inference, and the labels that they came with."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_megatron import AutoModule
from lightning_megatron.data import ByteTokenizer, PackedTextDataset
from lightning_megatron.data.collators.padding import PaddingCollator
from lightning_megatron.data.text.packing import pack
from lightning_megatron.data.tokenizers import load_tokenizer
from tests.reference import pretrained
from tests.support.hf_data import made

WORDS = ["<s>", "</s>", "[UNK]", "user", "assistant", ":", *"abcdefgh"]
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %} {{ m.role }} : {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)
BOS, EOS = 0, 1


def tokenizer(begins: str = "<s>", template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One as Llama's (``<s>`` before a text), BERT's (something behind it, too), or GPT-2's."""
    rust = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(WORDS)}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = {"<s>": "<s> $A", "both": "<s> $A </s>", "": "$A"}[begins]
    rust.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="[UNK]", chat_template=template
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def batch_of(rows: list[dict[str, Any]], streaming: bool = False, **options: Any) -> dict[str, torch.Tensor]:
    """All samples, in order."""
    options = {"packing": False, "seq_length": 16, "batch_size": 99, "shuffle": False, **options}
    (batch,) = made(dataset=datasets.Dataset.from_list(rows), streaming=streaming, **options).train_dataloader()
    return batch


def shown(batch: dict[str, torch.Tensor], key: str = "input_ids") -> list[list[int]]:
    keep = batch["attention_mask"].bool()
    return [row[mask].tolist() for row, mask in zip(batch[key], keep, strict=True)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("begins", ["<s>", "both", ""])
def test_prompts_and_texts_begin_as_the_tokenizer_begins_them(begins, streaming):
    own = tokenizer(begins)
    rows = [{"q": "a b", "a": "c d"}, {"q": "<s> a", "a": "c </s>"}, {"q": "", "a": "c"}]
    batch = batch_of(rows, streaming, tokenizer=own, text_column="a", prompt_column="q")
    prompts = [[BOS, 6, 7], [BOS, 6], [BOS]] if begins else [[6, 7], [BOS, 6], []]
    answers = [[8, 9, EOS], [8, EOS], [8, EOS]]
    assert prompts[0] == [id_ for id_ in own("a b").input_ids if id_ != EOS]
    assert shown(batch) == [p + a for p, a in zip(prompts, answers, strict=True)]
    assert shown(batch, "labels") == [[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)]
    texts = shown(batch_of([{"text": "a b"}, {"text": "<s> a"}], streaming, tokenizer=own))
    assert texts == [[*own("a b").input_ids, EOS][: 4 if begins else 3], [BOS, 6, EOS]]


def test_a_tokenizer_json_and_packed_rows_begin_alike(tmp_path):
    tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["a b", "c", "<s> d"]
    files = [tmp_path / f"{number}.txt" for number in range(3)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    expected = [BOS, 6, 7, EOS, BOS, 8, EOS, BOS, 9, EOS]
    for source in (tokenizer(), tmp_path / "tokenizer.json"):
        wrapped = load_tokenizer(source)
        assert PackedTextDataset(pack(files, wrapped, tmp_path), 9)[0]["text"].tolist() == expected
        for streaming in (False, True):
            rows = [{"text": text} for text in texts]
            batch = batch_of(rows, streaming, tokenizer=source, packing=True, seq_length=9)
            assert batch["text"].tolist() == [expected]
    assert load_tokenizer(tokenizer()).identity != load_tokenizer(tokenizer("")).identity
    assert ByteTokenizer.identity == "bytes"


def test_messages_become_what_the_chat_template_says():
    own = tokenizer()
    asked = [{"role": "user", "content": "a"}]
    answer = [{"role": "assistant", "content": "b c"}]
    whole = own.apply_chat_template(asked + answer, return_dict=False)
    prompt = own.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert whole[0] == BOS != whole[1]
    assert shown(batch_of([{"messages": asked + answer}], tokenizer=own, text_column="messages")) == [whole]
    options = {"text_column": "completion", "prompt_column": "prompt"}
    batch = batch_of([{"prompt": asked, "completion": answer}], tokenizer=own, **options)
    assert shown(batch) == [whole]
    assert shown(batch, "labels") == [[-100] * len(prompt) + whole[len(prompt) :]]
    batch = batch_of([{"prompt": asked, "completion": "b c"}], tokenizer=own, **options)
    assert shown(batch) == [[*prompt, 7, 8, EOS]]
    with pytest.raises(ValueError, match="has no chat_template"):
        batch_of([{"messages": asked}], tokenizer=tokenizer(template=None), text_column="messages")
    with pytest.raises(ValueError, match="ByteTokenizer has none"):
        batch_of([{"messages": asked}], text_column="messages")
    with pytest.raises(ValueError, match="'completion' holds messages and 'prompt' 'a'"):
        batch_of([{"prompt": "a", "completion": answer}], tokenizer=own, **options)


ROWS = [
    {"input_ids": [0, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [9, 1], "labels": [9, 1]},
    {"input_ids": [6, 7, 8], "labels": [-100, -100, 8]},
]


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_are_given_are_kept(streaming):
    options = {"text_column": "input_ids", "tokenizer": tokenizer()}
    batch = batch_of(ROWS, streaming, **options)
    assert shown(batch) == [row["input_ids"] for row in ROWS]
    assert shown(batch, "labels") == [row["labels"] for row in ROWS]
    assert batch["labels"][1].tolist() == [9, 1, -100, -100]
    packed = batch_of(ROWS, streaming, **options, packing=True, seq_length=4)
    assert packed["tokens"].tolist() == [[0, 6, 7, 8], [9, 1, 6, 7]]
    assert packed["labels"].tolist() == [[-100, 7, 8, 9], [1, -100, -100, 8]]
    padded = [
        {**{key: [0, *values] for key, values in row.items()}, "attention_mask": [0] + [1] * len(row["labels"])}
        for row in ROWS
    ]
    batch = batch_of(padded, streaming, **options)
    assert shown(batch) == [row["input_ids"] for row in ROWS]
    assert shown(batch, "labels") == [row["labels"] for row in ROWS]
    kept: list[Any] = []
    batch_of(ROWS, streaming, **options, collate_fn=lambda samples: kept.append(samples) or samples)
    assert [sample["labels"] for sample in kept[0]] == [row["labels"] for row in ROWS]


def test_packed_labels_are_learnt_as_they_are():
    """The loss of a packed batch is that of its ids and labels in transformers' form."""
    module = AutoModule.from_pretrained(pretrained.new_model("llama")).build()
    batch = batch_of(ROWS, text_column="input_ids", tokenizer=tokenizer(), packing=True, seq_length=8)
    ids, labels = ([id_ for row in ROWS for id_ in row[key]] for key in ("input_ids", "labels"))
    inputs = module.get_batch(batch)
    with torch.no_grad():
        total, count = module.loss(module.active_model(**inputs), inputs)
        theirs = pretrained.new_model("llama")(torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False)
    assert float(total / count) == pytest.approx(float(theirs.loss), rel=1e-5)


def test_labels_that_fit_nothing_are_named_and_classes_are_none():
    with pytest.raises(ValueError, match="a row has 1 'labels' and 2 ids in 'input_ids'"):
        batch_of([{"input_ids": [1, 2], "labels": [1]}], text_column="input_ids")
    with pytest.raises(ValueError, match="'labels' has a value for each id, and 'text' holds str"):
        batch_of([{"text": "ab", "labels": [1, 2]}])
    assert shown(batch_of([{"text": "ab", "labels": 1}])) == [[*b"ab", ByteTokenizer.eod_id]]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_say_what_is_learnt_are_heard_in_every_row(streaming):
    """TRL's and transformers' masks; and labels that are missing in the first row, or in a later one."""
    ids, options = [0, 6, 7, 8], {"text_column": "input_ids", "tokenizer": tokenizer()}
    for name in ("completion_mask", "assistant_masks", "loss_mask"):
        batch = batch_of([{"input_ids": ids, name: [0, 0, 1, 1]}], streaming, **options)
        assert shown(batch) == [ids]
        assert shown(batch, "labels") == [[-100, -100, 7, 8]]
        with pytest.raises(ValueError, match=f"a row has 1 '{name}' and 4 ids in 'input_ids'; each id has one, 0 "):
            batch_of([{"input_ids": ids, name: [1]}], streaming, **options)
    both = {"input_ids": ids, "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 0, 1, 1]}
    assert shown(batch_of([both], streaming, **options), "labels") == [[-100, -100, 7, 8]]
    rows = [{"input_ids": [6], "labels": None}, {"input_ids": ids, "labels": [-100, -100, 7, 8]}]
    for mixed in (rows, rows[::-1]):
        with pytest.raises(ValueError, match="a row has 'labels' None beside ids in 'input_ids', and other rows"):
            batch_of(mixed, streaming, **options)
    apart = [{"input_ids": ids, "position_ids": [0, 1, 0, 1]}]
    with pytest.raises(
        ValueError, match="'position_ids' of a row do not increase by one, so it holds several documents"
    ):
        batch_of(apart, streaming, **options)
    assert len(batch_of([{"input_ids": ids, "position_ids": [0, 1, 2, 3]}], streaming, **options)["input_ids"]) == 1


def test_a_collator_keeps_padding_out_of_what_is_learnt():
    samples = [{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, {"input_ids": [3]}]
    batch = PaddingCollator(pad_id=0)(samples)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, -100], [3, -100, -100]]
