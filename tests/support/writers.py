"""The truth of generation: transformers' own models, with weights of which they write no text of one token."""

import functools
from typing import Any

import torch
import transformers as hf

from lightning_megatron import AutoModule
from tests.reference import pretrained

NEW = 12
# As in ``pretrained``, of four layers, for the interleaved pipeline.
_DEEP = {
    "gpt2-deep": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**{**pretrained._GPT2, "n_layer": 4})),
    "llama-deep": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**pretrained._GROUPED, "num_hidden_layers": 4})),
}
MODELS = {**_DEEP, **{name: make for name, make in pretrained.MODELS.items() if pretrained.writes(name)}}


@functools.cache
def model(name: str) -> Any:
    found = MODELS[name]().eval()
    found.generation_config = hf.GenerationConfig()  # no tokens that end a text but those that are asked for
    scaled = name in ("gemma2", "gemma3")  # they repeat the last token where their layers add little to it
    size, seed = (1.0, 8) if name.startswith("t5") else (0.3, 11 if scaled else 7)  # with which they write something
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in found.named_parameters():
        at = 4.0 if scaled else 0.0 if name == "gemma" else 1.0  # Gemma's norms add one
        at *= parameter.dim() == 1 and "bias" not in key
        parameter.data.copy_(at + size * torch.randn(parameter.shape, generator=generator))
    return found


def module(name: str) -> Any:
    """Ours, with the same weights."""
    return AutoModule.from_pretrained(model(name))


def prompts(name: str) -> dict[str, torch.Tensor]:
    """Three of different lengths, padded on the left; of a T5, on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, pretrained.VOCAB, (3, 7), generator=generator)
    mask = torch.arange(7) >= torch.tensor([[0], [3], [6]])
    if name.startswith("t5"):
        mask = mask.flip(1)
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


@functools.cache
def truth(name: str, **options: Any) -> torch.Tensor:
    """What transformers writes."""
    with torch.random.fork_rng():
        torch.manual_seed(options.pop("seed", 0))
        start = {"decoder_start_token_id": 0} if name.startswith("t5") else {}
        return model(name).generate(**prompts(name), max_new_tokens=NEW, pad_token_id=0, **start, **options)


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy-end": {"eos_token_id": "END"},
    "greedy-repetition": {"repetition_penalty": 1.7},
    "beams": {"num_beams": 3},
    "beams-short": {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never", "eos_token_id": "END"},
    "beams-long": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": "END"},
    "beams-repetition": {"num_beams": 2, "repetition_penalty": 1.7, "eos_token_id": "END"},
    # The same draws as transformers', from the same seed.
    "drawn": {"do_sample": True, "seed": 5},
    "drawn-top": {"do_sample": True, "seed": 6, "temperature": 2.5, "top_k": 60, "top_p": 0.9, "eos_token_id": "END"},
    "drawn-beams": {"do_sample": True, "seed": 7, "num_beams": 2, "top_k": 40, "eos_token_id": "END"},
}


def asked(name: str, request: str) -> dict[str, Any]:
    """The arguments; END is a token that the truth writes in the midst of a text."""
    end = int(truth(name)[0, -6])
    return {key: end if value == "END" else value for key, value in REQUESTS[request].items()}


def assert_as_transformers(name: str, request: str, texts: torch.Tensor) -> None:
    wanted = truth(name, **asked(name, request))
    assert texts.tolist() == wanted.tolist(), f"{name} {request}"
