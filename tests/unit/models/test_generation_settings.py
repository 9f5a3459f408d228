"""What a model says of writing text holds, and what ``generate`` is given passes through to transformers' loop."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightning_megatron import AutoModule, GPTModule
from lightning_megatron.cli.main import main
from tests.reference import pretrained
from tests.support import writers

NAMES = ("gpt2", "t5")
START = {"gpt2": {}, "t5": {"decoder_start_token_id": 0}}


LETTERS = [chr(0x4E00 + number) for number in range(pretrained.VOCAB - 6)] + list("abcdef")


def tokenizer() -> Any:
    """A letter for each token."""
    found = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token="a"))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(tokenizer_object=found)


def written(name: str, place: int) -> int:
    """A token that the greedy text has there, counted from its end."""
    return int(writers.truth(name)[0, place])


class Prefer(hf.LogitsProcessor):
    """A user's own."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_add(1, torch.tensor([9]), torch.full((len(scores), 1), 3.0))


class Long(hf.StoppingCriteria):
    """A user's own: each row ends when it has the token twice."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return (input_ids == input_ids[:, -1:]).sum(dim=1) > 1


# On both sides alike; END and LETTER are a token that the greedy text has, and its letter.
PASSED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "max_length": {"max_length": 15},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": "END"},
    "min_length": {"min_length": 14, "eos_token_id": "END"},
    "ends": {"eos_token_id": ["END", 3]},
    "stop_strings": {"stop_strings": ["LETTER"], "tokenizer": tokenizer()},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [["END"]]},
    "suppress_tokens": {"suppress_tokens": ["END"], "begin_suppress_tokens": [5]},
    "forced_eos_token_id": {"forced_eos_token_id": 8, "forced_bos_token_id": 4},
    "sequence_bias": {"sequence_bias": [[["END"], -9.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.6), "eos_token_id": "END"},
    "beams": {"num_beams": 4, "num_return_sequences": 3, "eos_token_id": "END"},
    "drawn": {"do_sample": True, "num_return_sequences": 3, "min_p": 0.02, "eos_token_id": "END"},
    "typical": {"do_sample": True, "typical_p": 0.7, "temperature": 1.7, "renormalize_logits": True},
    "own processor": {"logits_processor": [Prefer()]},
    "own criterion": {"stopping_criteria": [Long()]},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 6, int(ids[-1])], "num_beams": 2},
    "an object": {"generation_config": hf.GenerationConfig(max_new_tokens=5, num_beams=2, no_repeat_ngram_size=2)},
    "cache": {"use_cache": True},
}


def filled(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(filled(name, entry) for entry in value)
    end = written(name, -6)
    return {"END": end, "LETTER": LETTERS[end]}.get(value, value) if isinstance(value, str) else value


def both(name: str, ours: Any, theirs: Any, **given: Any) -> None:
    given = {key: filled(name, value) for key, value in given.items()}
    start = {} if "generation_config" in given else START[name]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        wanted = theirs.generate(**writers.prompts(name), **start, **copy.deepcopy(given))
    seen = ours.generate(**writers.prompts(name), **copy.deepcopy(given), seed=4)
    assert seen.tolist() == wanted.tolist(), given


@pytest.mark.parametrize("name", NAMES)
def test_arguments_pass_through(name: str) -> None:
    ours, theirs = writers.module(name), writers.model(name)
    for given in PASSED.values():
        own = {"max_length", "generation_config"} & given.keys()
        if "generation_config" in given:
            given = {"generation_config": copy.deepcopy(given["generation_config"])}
            given["generation_config"].update(pad_token_id=0, **START[name])
        length = {} if own else {"max_new_tokens": writers.NEW}
        both(name, ours, theirs, **length, **({} if "generation_config" in given else {"pad_token_id": 0}), **given)


SAID: list[dict[str, Any]] = [
    {"eos_token_id": ["END", 3], "pad_token_id": 2, "max_new_tokens": 12},
    {"do_sample": True, "temperature": 1.8, "top_k": 30, "top_p": 0.8, "max_length": 18},
    {"do_sample": True},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 2, "eos_token_id": "END"},
    {"repetition_penalty": 1.8, "suppress_tokens": ["END"], "max_new_tokens": 9, "cache_implementation": "hybrid"},
]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_model_says_holds_unless_something_is_given(name: str) -> None:
    model = copy.deepcopy(writers.model(name))
    for says in SAID:
        said = {key: filled(name, value) for key, value in says.items()}
        model.generation_config = hf.GenerationConfig(pad_token_id=said.pop("pad_token_id", 0), **START[name], **said)
        module = AutoModule.from_pretrained(model)
        both(name, module, model)
        both(name, module, model, max_new_tokens=7, do_sample=False, num_beams=1)


def test_a_file_says_it_too_and_a_checkpoint(tmp_path: Any) -> None:
    model = copy.deepcopy(writers.model("gpt2"))
    model.generation_config = hf.GenerationConfig(eos_token_id=[written("gpt2", -6), 3], pad_token_id=0)
    model.save_pretrained(tmp_path / "model")
    main(["import", str(tmp_path / "model"), str(tmp_path / "checkpoint")])
    for module in (
        AutoModule.from_pretrained(tmp_path / "model"),
        GPTModule.load_from_checkpoint(tmp_path / "checkpoint"),
    ):
        both("gpt2", module, model, max_new_tokens=writers.NEW)
        text = module.generate(**writers.prompts("gpt2"), max_new_tokens=writers.NEW, eos_token_id=[])
        assert text.tolist() == writers.truth("gpt2").tolist(), "it did not run past its end"


def test_padding_is_found_as_transformers_finds_it() -> None:
    model = copy.deepcopy(writers.model("gpt2"))
    model.generation_config = hf.GenerationConfig(pad_token_id=0, eos_token_id=3)
    ids = writers.prompts("gpt2")["input_ids"]
    assert AutoModule.from_pretrained(model).generate(ids).tolist() == model.generate(ids).tolist()


def test_scores_are_transformers() -> None:
    given = {"max_new_tokens": 4, "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}
    seen = writers.module("gpt2").generate(**writers.prompts("gpt2"), **given)
    wanted = writers.model("gpt2").generate(**writers.prompts("gpt2"), **given)
    assert torch.equal(seen.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(seen.scores), torch.stack(wanted.scores), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"assistant_model": 3}, r"generate\(assistant_model=\.\.\.\) is not supported: it asks for another model"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"num_beam_groups": 2}, "num_beam_groups"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": 1}, "inputs_embeds"),
        ({"custom_generate": "x"}, "custom_generate"),
        ({"generation_config": hf.GenerationConfig(guidance_scale=1.5)}, "say guidance_scale=1.5"),
        ({"max_new_token": 3}, "no argument 'max_new_token'; did you mean 'max_new_tokens'"),
        ({"stop_strings": ["a"]}, "stop_strings.*Give tokenizer="),
        ({"num_return_sequences": 2}, "do_sample != True.*num_return_sequences"),
        ({"num_return_sequences": 3, "num_beams": 2}, r"num_return_sequences. \(3\) has to be"),
        ({"max_length": 3}, r"max_length=3\): the text begins with 7 tokens"),
        ({"streamer": 3}, "streamer=3.*has no put"),
        ({"stream": print, "streamer": hf.TextStreamer(None)}, "use one of them"),
        ({"logits_processor": [3]}, r"logits_processor=\[3\]"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_here_is_refused_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        writers.module("gpt2").generate(**writers.prompts("gpt2"), **given)
