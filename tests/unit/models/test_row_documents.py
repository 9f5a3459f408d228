"""Which documents share a row: what each tool's batches say, what is refused, and what is not predicted.

Batches have the keys and the values of the collators that make them: transformers' and TRL's own, and Megatron's form
of ``cu_seqlens``, which NeMo and Megatron-Bridge pad with -1.
"""

from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule, T5Config, T5Module
from lightning_megatron.models import row_documents
from lightning_megatron.models.host_answers import ask, remember, with_answers

SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 32, "seq_length": 16}
LENGTHS = (3, 1, 4)
TEXTS = [{"input_ids": list(range(first, first + size))} for first, size in zip((1, 10, 20), LENGTHS, strict=True)]
IDS = torch.tensor([[id_ for text in TEXTS for id_ in text["input_ids"]]])
NUMBERS = [[0, 0, 0, 1, 2, 2, 2, 2]]
PLACES = [[0, 1, 2, 0, 0, 1, 2, 3]]
BORDERS = [0, 3, 4, 8]


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def flattened(**options: Any) -> dict:
    return transformers.DataCollatorWithFlattening(**options)(TEXTS)


def shifted(row: torch.Tensor) -> dict:
    return {"tokens": row, "labels": row.roll(-1, 1)}


SOURCES = {
    "transformers": flattened(),
    "transformers, for flash attention": flattened(return_flash_attn_kwargs=True, return_seq_idx=True),
    "transformers, without positions": flattened(return_flash_attn_kwargs=True, return_position_ids=False),
    "transformers, by numbers": flattened(return_seq_idx=True, return_position_ids=False),
    "TRL": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(TEXTS),
    "Megatron-LM": {**shifted(IDS), "cu_seqlens": int32([BORDERS]), "max_seqlen": int32([4])},
    "NeMo": {
        **shifted(IDS),
        "attention_mask": torch.tensor([1]),
        "position_ids": torch.tensor(PLACES),
        "token_count": [8],
        "cu_seqlens": int32([[*BORDERS, -1]]),
        "cu_seqlens_argmin": torch.tensor([[4]]),
        "max_seqlen": int32([[4]]),
    },
    "repeated": {**shifted(IDS), "cu_seqlens": int32([[*BORDERS, 8, 8]])},
    "padded documents": {
        **shifted(IDS),
        "cu_seqlens": int32([[0, 2, 3, 6, -1]]),
        "cu_seqlens_padded": int32([[*BORDERS, -1]]),
    },
}
MODULES = {
    kind: GPTModule(GPTConfig(**SIZES, position_embedding=kind)) for kind in ("learned", "rope")
}  # fmt: skip


def prepared(module: Any, batch: dict) -> dict:
    """The inputs as a run makes them, with the answers of the host."""
    module.check_batch(batch)
    remember(batch, ask(batch, module._questions(batch)))
    return module.get_batch(batch)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("source", SOURCES)
def test_batches_of_each_tool_keep_their_documents_apart(source, kind):
    found = prepared(MODULES[kind], SOURCES[source])
    assert found["attention_mask"].documents.tolist() == NUMBERS
    assert found["attention_mask"].keep is None
    assert found["position_ids"].tolist() == PLACES


def test_rows_have_borders_of_their_own():
    rows = {**shifted(IDS.expand(3, 8)), "cu_seqlens": int32([[0, 3, 4, 8], [0, 8, -1, -1], [0, 5, 8, -1]])}
    found = prepared(MODULES["rope"], rows)
    assert found["attention_mask"].documents.tolist() == [*NUMBERS, [0] * 8, [0] * 5 + [1] * 3]
    assert found["position_ids"].tolist() == [*PLACES, list(range(8)), [0, 1, 2, 3, 4, 0, 1, 2]]
    second = {name: value[1:2] for name, value in rows.items()}  # as a micro-batch
    found = MODULES["rope"].get_batch(second)
    assert found["attention_mask"] is None
    assert found["position_ids"] is None


def test_the_host_answers_for_borders_of_one_row():
    batch = SOURCES["transformers, for flash attention"]
    remember(batch, ask(batch, MODULES["rope"]._questions(batch)))
    assert with_answers(batch)["host_answers"] == {"is_one_document": [False], "_has_positions_in_order": [False]}


def test_no_document_is_predicted_from_the_one_before_it():
    """Where labels are made here; those of a loader are its own, and transformers learns those across borders."""
    module, packed = MODULES["rope"], {"input_ids": IDS, "cu_seqlens": int32([BORDERS])}
    within = [[1, 1, 0, 0, 1, 1, 1, 0]]
    assert prepared(module, packed)["loss_mask"].tolist() == within
    assert prepared(module, {"input_ids": IDS, "position_ids": torch.tensor(PLACES)})["loss_mask"].tolist() == within
    eod = GPTModule(module.config, eod_id=3, reset_attention_mask=True)
    assert prepared(eod, {"input_ids": IDS})["loss_mask"].tolist() == [[1, 1, 0, 1, 1, 1, 1, 0]]
    for source in ("transformers", "TRL"):  # their labels are -100 there
        assert prepared(module, SOURCES[source])["loss_mask"].tolist() == within
    assert prepared(module, {**packed, "labels": IDS})["loss_mask"].tolist() == [[1] * 7 + [0]]
    assert prepared(module, SOURCES["Megatron-LM"])["loss_mask"].tolist() == [[1] * 8]
    one_text = {"input_ids": IDS, "position_ids": torch.tensor(PLACES), "attention_mask": torch.ones(1, 8)}
    assert prepared(module, one_text)["loss_mask"].tolist() == [[1] * 7 + [0]]


def test_a_row_may_be_longer_than_the_model_if_no_document_is():
    module = MODULES["learned"]
    long = {"input_ids": torch.ones(1, 30, dtype=torch.long)}
    module.check_batch({**long, "cu_seqlens": int32([[0, 16, 30]])})
    with pytest.raises(ValueError, match="sequences of 17 tokens.*seq_length=16"):
        module.check_batch({**long, "cu_seqlens": int32([[0, 17, 30]])})


def test_padding_is_a_document_of_its_own():
    inputs = MODULES["learned"].get_batch({"input_ids": IDS, "cu_seqlens": int32([BORDERS])})
    padded = MODULES["learned"].pad_inputs(inputs, 5)
    assert padded["attention_mask"].documents.tolist() == [[*NUMBERS[0], 3, 3]]
    assert padded["loss_mask"].tolist() == [[1, 1, 0, 0, 1, 1, 1, 0, 0, 0]]


POSITIONS, PLAIN = torch.tensor(PLACES), torch.arange(8)[None]
TWICE = {"input_ids": IDS.expand(2, 8)}


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"cu_seqlens": int32([[0, 3, 7]])}, r"'cu_seqlens' of row 0 is \[0, 3, 7\], and the row has 8 tokens"),
        ({"cu_seq_lens_q": int32([0, 3, 9])}, r"\[0, 3, 9\], and the row has 8 tokens. It rises from 0 to 8"),
        ({"cu_seqlens": int32([[1, 8]])}, "It rises from 0"),
        ({"cu_seqlens": int32([[0, 5, 3, 8]])}, "It rises from 0"),
        ({"cu_seqlens": int32([[0, 3, -1, 8]])}, "It rises from 0"),
        ({"cu_seqlens": int32([[0, 8, -1, 8]])}, "It rises from 0"),
        ({"cu_seqlens": int32([[-1, -1]])}, r"is \[-1, -1\], and the row has 8 tokens"),
        ({"cu_seqlens": int32([[[0, 8]]])}, r"'cu_seqlens' is \(1, 1, 2\) of torch.int32; it takes whole numbers"),
        ({"cu_seqlens": [0, 8]}, r"'cu_seqlens' is \[0, 8\]; it takes whole numbers"),
        ({"cu_seq_lens_q": int32([0, 8]), "cu_seq_lens_k": [0, 8]}, "'cu_seq_lens_k' is .*takes whole numbers"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, r"'cu_seqlens' is \(2,\) of torch.float32; it takes whole numbers"),
        ({**TWICE, "cu_seqlens": int32([0, 8, 16])}, r"'cu_seqlens' is \(3,\), and the batch has 2 rows"),
        ({"cu_seq_lens_q": int32([0, 8]), "cu_seq_lens_k": int32([0, 4, 8])}, "'cu_seq_lens_k' is not 'cu_seq_lens_q'"),
        ({"cu_seq_lens_k": int32([0, 8])}, "'cu_seq_lens_k' is not 'cu_seq_lens_q'"),
        (
            {"cu_seqlens": int32([[0, 5, 8]]), "position_ids": POSITIONS},
            "at token 5 of row 0 'cu_seqlens' begins a document, and 'position_ids' have 1 behind 0",
        ),
        (
            {"cu_seqlens": int32([[*BORDERS[:3], 6, 8]]), "position_ids": POSITIONS},
            "at token 6 of row 0 'cu_seqlens' begins a document, and 'position_ids' have 2 behind 1",
        ),
        (
            {"cu_seqlens": int32([[0, 8]]), "position_ids": POSITIONS},
            "at token 4 of row 0 'cu_seqlens' has no border, and 'position_ids' have 0 behind 0",
        ),
        (
            {"cu_seqlens": int32([BORDERS]), "position_ids": torch.arange(8)[None]},
            "at token 3 of row 0 'cu_seqlens' begins a document",
        ),
        (
            {"cu_seqlens": int32([[0, 3, 6, 8]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 7, 0, 1]])},
            "at token 5 of row 0 'cu_seqlens' has no border, and 'position_ids' have 7 behind 1",
        ),
        (
            {**TWICE, "cu_seqlens": int32([[*BORDERS], [0, 3, 8, -1]]), "position_ids": POSITIONS},
            "at token 4 of row 1 'cu_seqlens' has no border, and 'position_ids' have 0 behind 0",
        ),
        (
            {**TWICE, "seq_idx": torch.tensor(NUMBERS), "position_ids": torch.cat([POSITIONS, PLAIN])},
            "at token 3 of row 1 'seq_idx' begins a document, and 'position_ids' have 3 behind 2",
        ),
        ({"seq_idx": torch.zeros(1, 8)}, r"'seq_idx' is \(1, 8\) of torch.float32"),
        ({"cu_seqlens": int32([BORDERS]), "seq_idx": torch.zeros(1, 7).long()}, r"'seq_idx' is \(1, 7\)"),
        ({"seq_idx": torch.zeros(1, 7).long()}, r"'seq_idx' is \(1, 7\) of torch.int64, and the tokens \(1, 8\)"),
        (
            {"cu_seqlens": int32([BORDERS]), "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])},
            "'cu_seqlens' and 'seq_idx' contradict each other: at token 4 of row 0",
        ),
    ],
    ids=str,
)
def test_borders_that_are_none_are_refused(batch, says):
    with pytest.raises(ValueError, match=says):
        MODULES["rope"].check_batch({"input_ids": IDS, **batch})


def test_positions_of_padding_are_no_documents():
    """Those of NeMo are 0 behind the last document, and those of Megatron-Bridge go on in a document's padding."""
    for positions, borders in (([0, 1, 2, 0, 1, 0, 0, 0], [0, 3, 8]), ([0, 1, 2, 3, 0, 1, 2, 0], [0, 4, 8])):
        batch = {**shifted(IDS), "position_ids": torch.tensor([positions]), "cu_seqlens": int32([borders])}
        MODULES["rope"].check_batch(batch)


def test_other_layers_look_at_all_tokens():
    module = GPTModule(GPTConfig(**SIZES, layers="transformer_engine"))
    with pytest.raises(ValueError, match="'cu_seqlens' that begin documents.*layers='torch'"):
        module.check_batch({"input_ids": IDS, "cu_seqlens": int32([BORDERS])})
    module.check_batch({"input_ids": IDS, "cu_seqlens": int32([[0, 8, -1]])})


ENCODER = BertModule(BertConfig(**SIZES, task="masked_lm"))
ONE_TO_A_ROW = ("next_sentence_label", "start_positions", "end_positions")
BY_NUMBERS = {"input_ids": IDS, "labels": IDS, "seq_idx": torch.tensor(NUMBERS)}


def test_texts_share_the_rows_of_an_encoder():
    found = prepared(ENCODER, BY_NUMBERS)
    assert not found["attention_mask"].causal
    assert found["attention_mask"].documents.tolist() == NUMBERS
    assert found["position_ids"].tolist() == PLACES
    keep = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])
    found = prepared(ENCODER, {**BY_NUMBERS, "attention_mask": keep})
    assert torch.equal(found["attention_mask"].keep, keep.bool())
    assert ENCODER.pad_inputs(found, 5)["attention_mask"].documents.tolist() == [[*NUMBERS[0], 3, 3]]
    assert prepared(ENCODER, {**BY_NUMBERS, "seq_idx": torch.zeros(1, 8).int()})["attention_mask"] is None


@pytest.mark.parametrize(
    ("task", "batch", "says"),
    [
        ("sequence_classification", BY_NUMBERS, "several texts share a row.*one token of a row alone"),
        ("pretraining", BY_NUMBERS, "several texts share a row.*one token of a row alone"),
        ("question_answering", BY_NUMBERS, "several texts share a row.*one answer is looked for"),
        ("masked_lm", flattened(), "'position_ids' begin anew in a row.*Add 'seq_idx' or 'cu_seq_lens_q'"),
        (
            "masked_lm",
            SOURCES["padded documents"],
            "'cu_seqlens_padded' says that documents are padded.*attention_mask",
        ),
    ],
)
def test_what_an_encoder_cannot_keep_apart_is_refused(task, batch, says):
    module = BertModule(BertConfig(**SIZES, task=task))
    tokens = batch.get("input_ids", IDS)
    labels = torch.zeros(1, dtype=torch.long) if task == "sequence_classification" else tokens
    with pytest.raises(ValueError, match=says):
        module.check_batch(
            {**dict.fromkeys(ONE_TO_A_ROW, torch.zeros(1).long()), **batch, "input_ids": tokens, "labels": labels}
        )


def test_what_says_that_the_texts_of_an_encoder_look_at_one_another():
    """Padding is masked, or positions are those of one text, or borders are there beside them."""
    masked, ids = {"attention_mask": torch.ones(1, 8)}, {"input_ids": IDS, "labels": IDS}
    for batch in (
        {"cu_seqlens": int32([BORDERS]), "cu_seqlens_padded": int32([BORDERS]), **masked},
        {"position_ids": POSITIONS, **masked},
        {"position_ids": POSITIONS, "seq_idx": torch.tensor(NUMBERS)},
        {"position_ids": PLAIN},
    ):
        ENCODER.check_batch({**ids, **batch})
    for padded in ("cu_seqlens_q_padded", "cu_seqlens_unpadded"):
        with pytest.raises(ValueError, match=f"'{padded}' says that documents are padded"):
            ENCODER.check_batch({**ids, "seq_idx": torch.tensor(NUMBERS), padded: int32([BORDERS])})
    rows = {"input_ids": IDS.expand(2, 8), "labels": IDS.expand(2, 8)}
    with pytest.raises(ValueError, match="'position_ids' begin anew in a row"):
        ENCODER.check_batch({**rows, "position_ids": torch.cat([PLAIN, POSITIONS])})


def test_one_row_of_numbers_is_that_of_all_rows():
    module, batch = MODULES["rope"], {**TWICE, "seq_idx": torch.tensor(NUMBERS)}
    assert prepared(module, batch)["attention_mask"].documents.tolist() == NUMBERS * 2


def test_a_mask_of_rows_is_left_out_beside_borders_alone():
    mask = {"attention_mask": torch.ones(1)}
    assert row_documents.without_token_mask(mask) == mask
    assert "attention_mask" not in row_documents.without_token_mask({**mask, "cu_seqlens": int32([BORDERS])})


def test_a_document_begins_where_positions_leave_something_out():
    batch = {"position_ids": torch.tensor([[0, 1, 2, 5, 6, 7, 0, 1], [3, 4, 5, 6, 7, 8, 9, 10]])}
    assert row_documents.is_one_document(batch).tolist() == [False, True]
    assert not row_documents.is_one_document({"position_ids": torch.tensor([[0, 1, 5, 6]])}).any()
    assert row_documents.numbers(batch, 8).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2], [0] * 8]


def test_places_and_numbers():
    numbers = row_documents.numbers({"seq_idx": torch.tensor([[4, 4, 2, 0, 0]])}, 5)
    assert numbers.tolist() == [[0, 0, 1, 2, 2]]
    assert row_documents.places(numbers).tolist() == [[0, 1, 0, 0, 1]]
    assert row_documents.longest({"cu_seqlens": int32([[0, 1, 7, 8]])}, 8) == 6
    assert row_documents.longest({"cu_seqlens": int32([[0, 3, 6, 8], [0, 2, 7, 8]])}, 8) == 5
    assert row_documents.within_documents(torch.ones(1, 5), numbers).tolist() == [[1, 0, 0, 1, 1]]


T5_SIZES = {**SIZES, "decoder_seq_length": 16}
T5S = {kind: T5Module(T5Config(**T5_SIZES, position_embedding=kind)) for kind in ("relative", "learned")}
TARGETS = torch.arange(1, 7)[None]
PAIRS = {
    "numbers": {"seq_idx": int32([[4, 4, 4, 5, 9, 9, 9, 9]]), "decoder_seq_idx": int32([[4, 4, 5, 5, 5, 9]])},
    "borders": {"cu_seqlens": int32([[*BORDERS, -1]]), "decoder_cu_seqlens": int32([[0, 2, 5, 6]])},
    "transformers' borders": {"cu_seq_lens_q": int32(BORDERS), "decoder_cu_seq_lens_q": int32([0, 2, 5, 6])},
    "positions": {"position_ids": torch.tensor(PLACES), "decoder_position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]])},
}


@pytest.fixture(autouse=True)
def trainers() -> None:
    for module in T5S.values():
        module.trainer = Trainer(accelerator="cpu", logger=False)


@pytest.mark.parametrize("kind", T5S)
@pytest.mark.parametrize("source", PAIRS)
def test_pairs_of_a_t5_share_rows_by_the_keys_of_others(source, kind):
    batch = {"input_ids": IDS % 32, "labels": TARGETS, **PAIRS[source]}
    T5S[kind].check_batch(batch)
    remember(batch, ask(batch, T5S[kind]._questions(batch)))
    found = T5S[kind].get_batch(batch)
    assert found["encoder_mask"].documents.tolist() == NUMBERS
    assert found["decoder_mask"].documents.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert found["cross_mask"].documents.tolist() == NUMBERS
    assert found["cross_mask"].query_documents.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert [found[name].causal for name in ("encoder_mask", "decoder_mask", "cross_mask")] == [False, True, False]
    assert found["decoder_input_ids"].tolist() == [[0, 1, 0, 3, 4, 0]], "each text begins with the start token"
    positions = [found.get(name) for name in ("position_ids", "decoder_position_ids")]
    if kind == "learned":
        assert [each.tolist() for each in positions] == [PLACES, [[0, 1, 0, 1, 2, 0]]]
    else:
        assert positions == [None, None]


ODD_PAIRS = {
    "a side alone": ({"seq_idx": int32([[0, 0, 0, 1, 1, 1, 1, 1]])}, "row 0 has 2 documents of the encoder and 1 of"),
    "one more": (
        {"cu_seqlens": int32([[0, 3, 8]]), "decoder_cu_seqlens": int32([[0, 2, 5, 6]])},
        "row 0 has 2 documents of the encoder and 3 of the decoder",
    ),
    "another order": (
        {"seq_idx": int32([[1, 1, 1, 2, 2, 2, 2, 2]]), "decoder_seq_idx": int32([[2, 2, 2, 1, 1, 1]])},
        "document 0 of row 0 is number 1 of 'seq_idx' and 2 of 'decoder_seq_idx'",
    ),
    "a border beyond the end": ({"decoder_cu_seqlens": int32([[0, 2, 8]])}, "'decoder_'.*'cu_seqlens' of row 0"),
    "positions beside a mask": (
        {"position_ids": torch.tensor(PLACES), "attention_mask": torch.ones(1, 8)},
        "beside an 'attention_mask' they do not say",
    ),
    "a mask of queries": ({**PAIRS["numbers"], "enc_mask": torch.ones(1, 8, 8)}, "'enc_mask' says who looks at whom"),
    "a long text": (
        {"input_ids": torch.ones(1, 20, dtype=torch.int64), "labels": TARGETS},
        "'input_ids' has 20 tokens, but T5Config.seq_length=16",
    ),
}


@pytest.mark.parametrize("name", ODD_PAIRS)
def test_documents_that_are_no_pairs_are_refused(name):
    changes, message = ODD_PAIRS[name]
    with pytest.raises(ValueError, match=message):
        T5S["relative"].check_batch({"input_ids": IDS % 32, "labels": TARGETS, **changes})


def test_a_row_of_a_t5_may_be_longer_than_its_texts_and_padded_on_one_side():
    numbers, targets = torch.arange(4).repeat_interleave(10)[None], torch.arange(3).repeat_interleave(2)[None]
    batch = {"input_ids": numbers % 32, "labels": TARGETS, "seq_idx": numbers, "decoder_seq_idx": targets}
    T5S["relative"].check_batch({**batch, "attention_mask": (numbers < 3).long()})
    with pytest.raises(ValueError, match="4 documents of the encoder and 3 of the decoder"):
        T5S["relative"].check_batch(batch)
