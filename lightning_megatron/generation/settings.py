"""How tokens are chosen: ``GenerationSettings``, refused where they make no sense, and as transformers takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The arguments of ``generate`` that say how tokens are chosen; documented there.

    Raises:
        ValueError: One is out of range, or belongs to another way of choosing.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    top_p_decay: float = 1.0
    top_p_bound: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        self._check_ranges()
        self._check_company("do_sample=True", self.do_sample, ("temperature", "top_k", "top_p"))
        self._check_company("top_p", self.top_p is not None, ("top_p_decay", "top_p_bound"))
        self._check_company("num_beams above 1", self.num_beams > 1, ("length_penalty", "early_stopping"))

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end a text."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    def check_ids(self, vocab_size: int) -> None:
        """Refuse special tokens that the model does not know.

        Raises:
            ValueError: One is outside of the vocabulary.
        """
        padding = [] if self.pad_token_id is None else [self.pad_token_id]
        for name, ids in (("eos_token_id", self.end_ids), ("pad_token_id", padding)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"generate({name}={token}): the vocabulary has ids 0 to {vocab_size - 1}. Use the tokenizer's"
                        f" {name}, or None."
                    )

    def to_transformers(self) -> GenerationConfig:
        """All that transformers' loop knows of."""
        padding = self.pad_token_id if self.pad_token_id is not None else next(iter(self.end_ids), None)
        beams = {"length_penalty": self.length_penalty, "early_stopping": self.early_stopping}
        draws = {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
        if self._decays:
            draws = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            repetition_penalty=float(self.repetition_penalty),
            num_beams=self.num_beams,
            eos_token_id=self.end_ids or None,
            pad_token_id=padding,
            use_cache=False,  # the decoder keeps its own, which the loop need not know
            **(beams if self.num_beams > 1 else {}),
            **(draws if self.do_sample else {}),
        )

    def processors(self) -> LogitsProcessorList:
        """What changes the scores besides: a ``top_p`` that decays, and before it, in transformers' order, the rest."""
        found = LogitsProcessorList()
        if not self._decays:
            return found
        keep = len(self.end_ids) + 1 if self.num_beams > 1 else 1  # beams need a token that goes on
        if self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k, min_tokens_to_keep=keep))
        found.append(_DecayingTopP(float(self.top_p or 1.0), self.top_p_decay, self.top_p_bound, keep))
        return found

    @property
    def _decays(self) -> bool:
        return self.top_p is not None and self.top_p_decay < 1

    def _check_ranges(self) -> None:
        for name in ("max_new_tokens", "num_beams", "top_k"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"generate({name}={value!r}): use a whole number.")
        for name in ("temperature", "top_p", "top_p_decay", "top_p_bound", "repetition_penalty", "length_penalty"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
                raise ValueError(f"generate({name}={value!r}): use a number.")
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "a whole number from 1"),
            "temperature": (self.temperature > 0, "a number above 0 (low is cautious); without do_sample it is greedy"),
            "top_k": (self.top_k is None or self.top_k >= 0, "a whole number from 1, or None for all tokens"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "a probability, above 0 to 1, or None"),
            "top_p_decay": (0 < self.top_p_decay <= 1, "a factor, above 0 to 1"),
            "top_p_bound": (0 <= self.top_p_bound <= (self.top_p or 1), "a probability, from 0 to top_p"),
            "repetition_penalty": (self.repetition_penalty > 0, "a number above 0; above 1 it penalises"),
            "num_beams": (self.num_beams >= 1, "a whole number from 1"),
            "early_stopping": (self.early_stopping in (True, False, "never"), "True, False or 'never'"),
        }
        for name, (fits, use) in ranges.items():
            if not fits:
                raise ValueError(f"generate({name}={getattr(self, name)!r}): use {use}.")

    def _check_company(self, needed: str, there: bool, names: tuple[str, ...]) -> None:
        defaults = type(self).__dataclass_fields__
        for name in names:
            if not there and getattr(self, name) != defaults[name].default:
                raise ValueError(
                    f"generate({name}={getattr(self, name)!r}) does nothing without {needed}. Add that, or leave {name}"
                    " out."
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
