"""``GenerationSettings``: how tokens are chosen, by transformers' arguments and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerationMode

from lightning_megatron.distributed.suggestions import closest_name

EarlyStopping = bool | Literal["never"]

_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}
_DEFAULT_NEW = 20  # tokens that transformers adds where nothing is said
# Of keys and values, compilation and drafts: a text is the same with and without them.
_WITHOUT_EFFECT = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
    "continuous_batching_config", "prefill_chunk_size", "low_memory", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
}  # fmt: skip
_ONE_MODEL = "it asks for another model, or for other passes of this one, beside the text's"
_OTHER_PASSES = "the stages of a pipeline return scores only"
_OTHER_START = "a text begins with input_ids, and T5's decoder with decoder_start_token_id"
_ONE_TEXT = "a row is one prompt, and texts that share one are not continued; give each its row"
_OF_DOCUMENTS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_REFUSED = {
    **dict.fromkeys(_OF_DOCUMENTS, _ONE_TEXT),
    "assistant_model": _ONE_MODEL,
    "assistant_tokenizer": _ONE_MODEL,
    "assistant_early_exit": _ONE_MODEL,
    "prompt_lookup_num_tokens": _ONE_MODEL,
    "use_mtp": _ONE_MODEL,
    "guidance_scale": _ONE_MODEL,
    "negative_prompt_ids": _ONE_MODEL,
    "negative_prompt_attention_mask": _ONE_MODEL,
    "dola_layers": _OTHER_PASSES,
    "output_attentions": _OTHER_PASSES,
    "output_hidden_states": _OTHER_PASSES,
    "token_healing": _OTHER_START,
    "inputs": _OTHER_START,
    "inputs_embeds": _OTHER_START,
    "decoder_input_ids": _OTHER_START,
    "decoder_attention_mask": _OTHER_START,
    "encoder_outputs": _OTHER_START,
    "position_ids": "positions are those behind the padding",
    "token_type_ids": "no model here that writes text has token types",
    "past_key_values": "keys and values are kept by megatron-core",
    "cache": "keys and values are kept by megatron-core",
    "custom_generate": "the loop is transformers' own",
    "trust_remote_code": "the loop is transformers' own",
    "synced_gpus": "the ranks of a replica write the same text",
    "constraints": "transformers has moved it out of its loop",
    "force_words_ids": "transformers has moved it out of its loop",
    "penalty_alpha": "transformers has moved it out of its loop",
    "num_beam_groups": "transformers has moved it out of its loop",
    "diversity_penalty": "transformers has moved it out of its loop",
}
_ONE_MORE_PASS = ("guidance_scale", "token_healing", "output_attentions", "output_hidden_states")
_OF_THE_ENCODER = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")


@dataclass(frozen=True)
class GenerationSettings:
    """What ``generate`` was asked for, over what the model says itself.

    Args:
        config: transformers' settings, complete but for its defaults.
        given: The arguments that were given.
        max_new_tokens: The largest number of tokens that are added.
        top_p_decay: Factor on ``top_p`` after each token.
        top_p_bound: ``top_p`` decays no further than this.
    """

    config: GenerationConfig
    given: dict[str, Any]
    max_new_tokens: int
    top_p_decay: float = 1.0
    top_p_bound: float = 0.0

    @classmethod
    def of(
        cls,
        given: Mapping[str, Any],
        own: Mapping[str, Any],
        start: int,
        longest: int | None,
        top_p_decay: float = 1.0,
        top_p_bound: float = 0.0,
        encodes: bool = False,
    ) -> GenerationSettings:
        """Set what was asked for over what the model says.

        Args:
            given: Arguments of ``generate``; those that are None were not given.
            own: The settings of the model's ``generation_config.json``.
            start: Tokens that the texts begin with, padding included.
            longest: Tokens of the longest text, for a call that says nothing of it.
            top_p_decay: Factor on ``top_p`` after each token.
            top_p_bound: ``top_p`` decays no further than this.
            encodes: Whether an encoder reads the prompts.

        Raises:
            ValueError: An argument is not known or not here, is out of range, or belongs to another way of choosing.
        """
        given = {name: _plain(value) for name, value in given.items() if value is not None}
        fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
        for name, value in given.items():
            _check_known(name, value, fields)
        merged = {name: value for name, value in own.items() if name in fields and value is not None} | given
        merged = {name: value for name, value in merged.items() if name not in _WITHOUT_EFFECT}
        _check_ranges(merged, top_p_decay, top_p_bound)
        config = GenerationConfig(**merged, use_cache=False)  # the decoder keeps its own, which the loop need not know
        settings = cls(config, given, _new_tokens(config, start, longest), top_p_decay, top_p_bound)
        settings._check_company(encodes)
        return settings

    @property
    def num_beams(self) -> int:
        """The number of beams that each text is searched with."""
        return self.config.num_beams or 1

    @property
    def copies(self) -> int:
        """Number of texts of each prompt."""
        return max(self.num_beams, self.config.num_return_sequences or 1)

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end a text."""
        ends = self.config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def check_ids(self, vocab_size: int) -> None:
        """Refuse special tokens that the model does not know.

        Raises:
            ValueError: One is outside of the vocabulary.
        """
        padding = [] if self.config.pad_token_id is None else [self.config.pad_token_id]
        ends = self.end_ids if "eos_token_id" in self.given else []
        for name, ids in (("eos_token_id", ends), ("pad_token_id", padding)):
            for token in ids:
                if not isinstance(token, int) or not 0 <= token < vocab_size:
                    raise ValueError(
                        f"generate({name}={token!r}): the vocabulary has ids 0 to {vocab_size - 1}. Use the tokenizer's"
                        f" {name}."
                    )

    def to_transformers(self) -> GenerationConfig:
        """The settings that transformers' loop is given."""
        config = GenerationConfig(**{name: value for name, value in vars(self.config).items() if name[0] != "_"})
        config.max_new_tokens, config.max_length, config.max_time = self.max_new_tokens, None, None
        config.eos_token_id = self.end_ids or None
        if config.pad_token_id is None:
            config.pad_token_id = next(iter(self.end_ids), None)
        if self._decays:
            config.temperature, config.top_k, config.top_p = 1.0, 0, 1.0
        return config

    def processors(self) -> LogitsProcessorList:
        """What changes the scores besides: a ``top_p`` that decays, and before it, in transformers' order, the rest."""
        found = LogitsProcessorList()
        if not self._decays:
            return found
        keep = len(self.end_ids) + 1 if self.num_beams > 1 else 1  # beams need a token that goes on
        if self.config.temperature not in (None, 1.0):
            found.append(TemperatureLogitsWarper(float(self.config.temperature)))
        top_k = 50 if self.config.top_k is None else self.config.top_k
        if top_k:
            found.append(TopKLogitsWarper(top_k, min_tokens_to_keep=keep))
        found.append(_DecayingTopP(float(self.config.top_p or 1.0), self.top_p_decay, self.top_p_bound, keep))
        return found

    @property
    def _decays(self) -> bool:
        return self.config.top_p is not None and self.top_p_decay < 1

    def _check_company(self, encodes: bool) -> None:
        """Refuse settings that do nothing, or that ask for another loop."""
        config, draws, beams = self.config, bool(self.config.do_sample), self.num_beams > 1
        _needs("do_sample=True", draws, self.given, {"temperature": 1.0, "top_k": 0, "top_p": 1.0})
        _needs("num_beams above 1", beams, self.given, {"length_penalty": 1.0, "early_stopping": False})
        decays = {"top_p_decay": self.top_p_decay, "top_p_bound": self.top_p_bound}
        _needs("top_p", config.top_p is not None, decays, {"top_p_decay": 1.0, "top_p_bound": 0.0})
        mode = config.get_generation_mode()
        if mode not in _MODES:
            raise ValueError(
                f"generate: the model's generation_config.json asks for {str(mode.value).replace('_', ' ')}, which is"
                " not here; texts are greedy, drawn, or of beams. Give the arguments that say otherwise."
            )
        for name in (*_ONE_MORE_PASS, *(_OF_THE_ENCODER if encodes else ())):
            value = getattr(config, name, None)
            if value not in (None, 0, 1):
                why = _REFUSED.get(name, "the loop does not see what a T5's encoder reads")
                raise ValueError(
                    f"generate: the settings say {name}={value!r}, which is not supported: {why}. Give a"
                    " generation_config without it, or leave it out."
                )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _check_known(name: str, value: Any, fields: set[str]) -> None:
    if name in _REFUSED and value is not False:
        raise ValueError(f"generate({name}=...) is not supported: {_REFUSED[name]}. Leave it out.")
    if name not in fields and name not in _REFUSED:
        near = closest_name(name, sorted(fields - _REFUSED.keys()), similarity=0.6)
        raise ValueError(
            f"generate has no argument {name!r}{f'; did you mean {near!r}?' if near else '.'} It takes those of"
            " transformers' GenerationConfig."
        )


def _new_tokens(config: GenerationConfig, start: int, longest: int | None) -> int:
    """The largest number of tokens to add, as transformers counts them."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if config.max_length is None:
        return _DEFAULT_NEW if longest is None else max(min(_DEFAULT_NEW, longest - start), 1)
    if config.max_length <= start:
        raise ValueError(
            f"generate(max_length={config.max_length}): the text begins with {start} tokens, which leaves no room. Use"
            " max_new_tokens, which counts what is added."
        )
    return int(config.max_length) - start


def _check_ranges(merged: Mapping[str, Any], top_p_decay: float, top_p_bound: float) -> None:
    values = {**merged, "top_p_decay": top_p_decay, "top_p_bound": top_p_bound}
    for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "num_beams", "num_return_sequences",
                 "top_k", "no_repeat_ngram_size"):  # fmt: skip
        if name in values and (not isinstance(values[name], int) or isinstance(values[name], bool)):
            raise ValueError(f"generate({name}={values[name]!r}): use a whole number.")
    for name in ("temperature", "top_p", "top_p_decay", "top_p_bound", "repetition_penalty", "length_penalty"):
        if name in values and (not isinstance(values[name], int | float) or isinstance(values[name], bool)):
            raise ValueError(f"generate({name}={values[name]!r}): use a number.")
    draws = values.get("do_sample")
    ranges: dict[str, tuple[Any, str]] = {
        "max_new_tokens": (lambda value: value >= 1, "a whole number from 1"),
        "max_length": (lambda value: value >= 1, "a whole number from 1"),
        "min_new_tokens": (lambda value: value >= 0, "a whole number from 0"),
        "min_length": (lambda value: value >= 0, "a whole number from 0"),
        "temperature": (
            lambda value: value > 0 or not draws,
            "a number above 0 (low is cautious); without do_sample it is greedy",
        ),
        "top_k": (lambda value: value >= 0, "a whole number from 1, or 0 for all tokens"),
        "top_p": (lambda value: 0 < value <= 1, "a probability, above 0 to 1, or None"),
        "top_p_decay": (lambda value: 0 < value <= 1, "a factor, above 0 to 1"),
        "top_p_bound": (lambda value: 0 <= value <= values.get("top_p", 1), "a probability, from 0 to top_p"),
        "repetition_penalty": (lambda value: value > 0, "a number above 0; above 1 it penalises"),
        "num_beams": (lambda value: value >= 1, "a whole number from 1"),
        "num_return_sequences": (lambda value: value >= 1, "a whole number from 1"),
        "early_stopping": (lambda value: value in (True, False, "never"), "True, False or 'never'"),
    }
    for name, (fits, use) in ranges.items():
        if name in values and not fits(values[name]):
            raise ValueError(f"generate({name}={values[name]!r}): use {use}.")


def _needs(needed: str, there: bool, given: Mapping[str, Any], idle: Mapping[str, Any]) -> None:
    """Refuse arguments that have no effect, unless they have the values in ``idle``."""
    for name, nothing in idle.items():
        if not there and given.get(name, nothing) != nothing:
            raise ValueError(
                f"generate({name}={given[name]!r}) does nothing without {needed}. Add that, or leave {name} out."
            )


class _DecayingTopP(TopPLogitsWarper):
    """Top-p, whose share shrinks with each token, as Megatron's text generation has it."""

    def __init__(self, top_p: float, decay: float, bound: float, keep: int) -> None:
        super().__init__(top_p, min_tokens_to_keep=keep)
        self.top_p: float = top_p
        self.decay = decay
        self.bound = bound

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen: torch.Tensor = super().__call__(input_ids, scores)
        self.top_p = max(self.top_p * self.decay, self.bound)
        return chosen
