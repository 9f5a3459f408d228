"""Of a conversation, what the assistant writes is learnt, and conversations that share a row do not meet."""

import json
import random
import warnings
from collections import Counter

import datasets
import pytest
import torch

from lightning_megatron.data import ChatDataModule
from lightning_megatron.data.chat.encoder import ChatEncoder
from lightning_megatron.data.huggingface.whole_texts import best_fit
from lightning_megatron.data.tokenizers import load_tokenizer
from tests.support import chats
from tests.support.chats import CHATS, chat, of_trl, tokenizer
from tests.support.hf_data import made

TALK = chat(" What is 2+2? ", "It is 4.", "And 3+3?", "6, of course 😀.")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def learnt(messages, template, **options):
    """The text of which the tokens are learnt, each answer followed by "|"."""
    own = tokenizer(template)
    row = {"messages": messages} if isinstance(messages, list) else messages
    chosen = {"prompt_column": None, "loss_on": "assistant", "chat_template": None, "template_options": {}}
    encoder = ChatEncoder(load_tokenizer(own), "messages", **{**chosen, **options}, max_length=9999)
    ids, on = encoder.encode(row)
    parts = [[]]
    for id_, is_learnt in zip(ids, on, strict=True):
        parts[-1].append(id_) if is_learnt else parts.append([])
    return "|".join(own.decode(part) for part in parts if part)


@pytest.mark.parametrize(
    "name",
    ["cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "qwen3_vl",
     "qwen3_instruct_2507", "smolvlm"],
)  # fmt: skip
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_template_without_marks_is_learnt_as_trl_marks_it(name, system):
    system = None if name == "gemma" else system  # whose template refuses it
    plain, marked = of_trl(name), of_trl(f"{name}_training")
    messages = chat(*(message["content"] for message in TALK), system=system)
    expected = tokenizer(plain + marked).apply_chat_template(
        messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    wrapped = load_tokenizer(tokenizer(plain + marked))
    for template in (plain, marked):
        encoder = ChatEncoder(wrapped, "messages", None, "assistant", template, {}, 9999)
        ids, on = encoder.encode({"messages": messages})
        assert ids == expected["input_ids"]
        assert on == [bool(each) for each in expected["assistant_masks"]], template
    assert 0 < sum(on) < len(on)


def test_an_answer_is_what_the_model_is_to_write():
    end = "<|im_end|>\n"
    assert learnt(TALK, chats.CHATML) == f"It is 4.{end}|6, of course 😀.{end}"
    assert learnt(TALK, chats.MARKED) == "It is 4.<|im_end|>|6, of course 😀.<|im_end|>"
    assert learnt(TALK, chats.CHATML, loss_on="last") == f"6, of course 😀.{end}"
    assert learnt(TALK, chats.MARKED, loss_on="last") == "6, of course 😀.<|im_end|>"
    whole = tokenizer().apply_chat_template(TALK, tokenize=False)
    assert learnt(TALK, chats.CHATML, loss_on="all") == whole
    assert learnt(TALK[1:], chats.CHATML) == f"It is 4.{end}|6, of course 😀.{end}"
    assert learnt(TALK[:3], chats.CHATML) == f"It is 4.{end}"


def test_a_template_that_leaves_out_earlier_reasoning():
    thinks = "<think>\nhm\n</think>\n\n"
    messages = chat("2+2?", f"{thinks}4.", "3+3?", f"{thinks}6.")
    assert learnt(messages, of_trl("qwen3")) == f"4.<|im_end|>\n|{thinks}6.<|im_end|>\n"
    # What the template itself begins an answer with is not learnt.
    assert learnt(messages, of_trl("qwen3_5_think")) == "4.<|im_end|>\n|hm\n</think>\n\n6.<|im_end|>\n"
    # Where an answer ends otherwise if another message follows, its last token is that of the model alone.
    assert learnt(TALK, of_trl("gptoss")).endswith("6, of course 😀.<|return|>")
    assert learnt(messages, of_trl("qwen3"), loss_on="last") == f"{thinks}6.<|im_end|>\n"


def test_a_template_that_hides_an_answers_place_is_refused():
    template = "{{ messages | length }}: {% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    with pytest.raises(ValueError, match=r"comes before message 1 otherwise.*loss_on='last'"):
        learnt(TALK, template)


def test_nothing_is_learnt_in_a_prompt():
    row = {"prompt": TALK[:3], "messages": TALK[3:]}
    assert learnt(row, chats.CHATML, prompt_column="prompt") == "6, of course 😀.<|im_end|>\n"
    assert learnt(row, chats.MARKED, prompt_column="prompt") == "6, of course 😀.<|im_end|>"
    assert learnt(row, chats.CHATML, prompt_column="prompt", loss_on="all") == "6, of course 😀.<|im_end|>\n"


def test_rows_as_other_tools_have_them():
    share_gpt = [{"from": "human", "value": TALK[0]["content"]}, {"from": "gpt", "value": TALK[1]["content"]}]
    in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TALK[:2]]
    with_none = [{**message, "tool_calls": None, "name": None} for message in TALK[:2]]
    for messages in (share_gpt, in_parts, with_none):
        assert learnt(messages, chats.CHATML) == learnt(TALK[:2], chats.CHATML)
    assert learnt({"messages": json.dumps(TALK[:2])}, chats.CHATML) == learnt(TALK[:2], chats.CHATML)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    used = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    row = {"messages": [*used, *TALK[1:2]], "tools": json.dumps([{"name": "add"}])}
    seen = learnt(row, of_trl("qwen3"))
    assert '{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n|' in seen
    assert "tool_response" not in seen
    options = {"messages": TALK[:2], "chat_template_kwargs": {"enable_thinking": False}}
    assert learnt(options, of_trl("qwen3")) == "It is 4.<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("Hello.", r"holds 'Hello.', and needs a list of messages"),
        ([{"text": "a"}], r"needs a 'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"a part that is no text"),
        (chat("a", "b", system="c"), r"refuses messages of system, user, assistant: System role not supported"),
    ],
)
def test_rows_that_are_no_chats_are_refused(messages, told):
    with pytest.raises(ValueError, match=told):
        learnt({"messages": messages}, of_trl("gemma"))


def test_settings_are_refused_in_words(tmp_path):
    rows = datasets.Dataset.from_list([{"messages": TALK}])
    for options, told in [
        ({"loss_on": "answers"}, r"loss_on='answers'.*'assistant' or 'last' or 'all'"),
        ({"chat_template": "no/such.jinja"}, r"neither a template in Jinja nor the path"),
        ({"tokenizer": "bytes"}, r"ChatDataModule\(tokenizer='bytes'\) has no chat template"),
        ({"messages_column": "mesages"}, r"ChatDataModule\(messages_column='mesages'\).*messages"),
    ]:
        with pytest.raises(ValueError, match=told):
            made(kind=ChatDataModule, seq_length=256, dataset=rows, **{"tokenizer": tokenizer(), **options})
    (tmp_path / "own.jinja").write_text(chats.MARKED)
    data = made(
        kind=ChatDataModule, seq_length=256, dataset=rows, tokenizer=tokenizer(), chat_template=tmp_path / "own.jinja"
    )
    assert data.chat_template == chats.MARKED


def test_a_model_that_does_not_learn_to_stop_is_told_of():
    rows = datasets.Dataset.from_list([{"messages": TALK}])
    endless = chats.MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    with pytest.warns(UserWarning, match=r"last token that is learnt of an answer is '\.'.*does not learn to stop"):
        made(kind=ChatDataModule, seq_length=256, dataset=rows, tokenizer=tokenizer(endless))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(kind=ChatDataModule, seq_length=256, dataset=rows, tokenizer=tokenizer(), num_proc=1)


# Rows of several conversations


def test_best_fit_leaves_no_piece_out_and_fills_rows():
    draw = random.Random(3)
    lengths = [min(512, int(draw.expovariate(1 / 90)) + 1) for _ in range(3000)]
    rows = best_fit(lengths, 512)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert max(sum(lengths[piece] for piece in row) for row in rows) <= 512
    assert len(rows) <= 1.01 * sum(lengths) / 512 + 1
    assert best_fit([3, 5, 2, 5], 5) == [[1], [3], [0, 2]]


def rows_of(streaming=False, **options):
    data = datasets.Dataset.from_list([{"messages": messages} for messages in CHATS])
    options = {"seq_length": 192, "batch_size": 3, "tokenizer": tokenizer(), "shuffle": False, **options}
    return made(kind=ChatDataModule, dataset=data, streaming=streaming, **options)


def conversations(batches):
    """The ids and labels of each conversation, by where positions begin anew; padding is left out."""
    for batch in batches:
        for ids, labels, places in zip(*(batch[k] for k in ("input_ids", "labels", "position_ids")), strict=True):
            starts = [*(places == 0).nonzero().flatten().tolist(), len(ids)]
            for start, stop in zip(starts, starts[1:], strict=False):
                if (labels[start:stop] != -100).any():
                    yield tuple(ids[start:stop].tolist()), tuple(labels[start:stop].tolist())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_packed_rows_hold_every_conversation_once_and_whole(streaming, loss_on):
    alone = next(iter(rows_of(packing=False, batch_size=99, loss_on=loss_on).train_dataloader()))
    expected = Counter()
    for ids, labels, keep in zip(alone["input_ids"], alone["labels"], alone["attention_mask"].bool(), strict=True):
        labels[0] = -100
        expected[tuple(ids[keep].tolist()), tuple(labels[keep].tolist())] += 1
    batches = list(rows_of(streaming, loss_on=loss_on).train_dataloader())
    assert Counter(conversations(batches)) == expected
    assert len(expected) == 19
    assert max(batch["input_ids"].size(1) for batch in batches) == 192
    assert sum(len(batch["input_ids"]) for batch in batches) < 14, "rows are shared"


def test_packed_rows_are_trls():
    from trl.data_utils import pack_dataset

    alone = next(iter(rows_of(packing=False, batch_size=99).train_dataloader()))
    keep = alone["attention_mask"].bool()
    rows = [ids[shown].tolist() for ids, shown in zip(alone["input_ids"], keep, strict=True)]
    table = datasets.Dataset.from_dict({"input_ids": rows})
    theirs = {frozenset(Counter(row["seq_lengths"]).items()) for row in pack_dataset(table, 192, "bfd")}
    ours = set()
    for batch in rows_of(batch_size=1).train_dataloader():
        lengths = [len(ids) for ids, _ in conversations([batch])]
        ours.add(frozenset(Counter(lengths).items()))
    assert ours == theirs


def test_a_conversation_without_an_answer_in_its_row_is_left_out():
    rows = [{"messages": chat("a " * 40, "never reached")}, {"messages": chat("only a question")}, {"messages": TALK}]
    data = made(kind=ChatDataModule, dataset=datasets.Dataset.from_list(rows), tokenizer=tokenizer(), seq_length=64)
    (batch,) = data.train_dataloader()
    assert len(list(conversations([batch]))) == 1


def test_a_stream_goes_on_at_the_next_row():
    whole = list(rows_of(True, shuffle=True, shuffle_block=5, batch_size=2).train_dataloader())
    loader = rows_of(True, shuffle=True, shuffle_block=5, batch_size=2).train_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    state = loader.state_dict()
    later = rows_of(True, shuffle=True, shuffle_block=5, batch_size=2).train_dataloader()
    later.load_state_dict(state)
    rest = list(later)
    assert len(rest) == len(whole) - 2 > 0
    for seen, expected in zip(rest, whole[2:], strict=True):
        assert all(torch.equal(seen[name], expected[name]) for name in expected)
