"""Runs a user's processors, criteria and streamers so that all ranks of a replica decide and fail together.

A rank that stopped, or raised, alone would leave the others in their next pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lightning_megatron.distributed import collectives, process_groups

PrefixAllowedTokens = Callable[[int, torch.Tensor], list[int]]


@dataclass(frozen=True)
class Hooks:
    """A user's own functions that run at each token; transformers' arguments of the same names.

    Args:
        logits_processor: Processors that change the scores.
        stopping_criteria: Criteria that end texts; if ranks differ, the first rank decides.
        prefix_allowed_tokens_fn: Returns the tokens that may follow a text.
        tokenizer: The tokenizer that ``stop_strings`` needs.
        stream: Called with each new token of all texts, ``[b]``, on the replica's first rank.
        streamer: A streamer of transformers', called on the replica's first rank.
    """

    logits_processor: Sequence[LogitsProcessor] | None = None
    stopping_criteria: Sequence[StoppingCriteria] | None = None
    prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None
    tokenizer: Any = None
    stream: Callable[[torch.Tensor], Any] | None = None
    streamer: Any = None

    def check(self, num_beams: int, stop_strings: Any) -> None:
        """Refuse arguments that do not go together.

        Raises:
            ValueError: A stream of beams, two streams, or strings without a tokenizer.
            TypeError: Something is not of transformers' kind.
        """
        for name in ("stream", "streamer"):
            if getattr(self, name) is not None and num_beams > 1:
                raise ValueError(
                    f"generate({name}=..., num_beams={num_beams}): earlier tokens of beams may change. Leave one out."
                )
        if self.stream is not None and self.streamer is not None:
            raise ValueError("generate(stream=..., streamer=...): use one of them.")
        if stop_strings is not None and self.tokenizer is None:
            raise ValueError(
                f"generate(stop_strings={stop_strings!r}): matching them needs the tokenizer. Give tokenizer=, too."
            )
        for name in ("put", "end"):
            if self.streamer is not None and not hasattr(self.streamer, name):
                raise TypeError(f"generate(streamer={self.streamer!r}) has no {name}: use one of transformers'.")
        for argument, kind in (("logits_processor", LogitsProcessor), ("stopping_criteria", StoppingCriteria)):
            for entry in getattr(self, argument) or ():
                if not callable(entry):
                    raise TypeError(f"generate({argument}=[{entry!r}]): use a list of {kind.__name__}s.")

    def description(self) -> str:
        """The names of what is set, which ranks compare."""
        lists = (self.logits_processor, self.stopping_criteria)
        names = [[type(entry).__name__ for entry in entries or ()] for entries in lists]
        rest = [self.prefix_allowed_tokens_fn, self.tokenizer, self.stream, self.streamer]
        return repr((names, [entry is not None for entry in rest]))

    def processors(self, first: LogitsProcessorList, num_beams: int) -> LogitsProcessorList:
        """The processors in ``first``, and then the user's."""
        own = list(self.logits_processor or ())
        if self.prefix_allowed_tokens_fn is not None:
            own.append(PrefixConstrainedLogitsProcessor(self.prefix_allowed_tokens_fn, num_beams))
        return LogitsProcessorList([*first, *(entry if _is_alike(entry) else _Processor(entry) for entry in own)])

    def criteria(self, max_time: float | None) -> StoppingCriteriaList:
        """The user's criteria, and a limit of time."""
        own = list(self.stopping_criteria or ())
        own += [MaxTimeCriteria(max_time)] if max_time is not None else []
        return StoppingCriteriaList([entry if _is_alike(entry) else _Criteria(entry) for entry in own])


def _is_alike(entry: Any) -> bool:
    """Whether it does the same on every rank: transformers' own do, but for those that look at a clock or call on."""
    odd = (MaxTimeCriteria, PrefixConstrainedLogitsProcessor)
    return type(entry).__module__.startswith("transformers.") and not isinstance(entry, odd)


class _Processor(LogitsProcessor):
    """A user's processor, whose error on one rank is raised on every rank."""

    def __init__(self, own: LogitsProcessor) -> None:
        self.own = own

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found, _ = _together(self.own, lambda: self.own(input_ids, scores), lambda _: None)
        result: torch.Tensor = found
        return result


class _Criteria(StoppingCriteria):
    """A user's criterion, which decides on every rank as it does on the first."""

    def __init__(self, own: StoppingCriteria) -> None:
        self.own = own

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        _, ends = _together(
            self.own,
            lambda: self.own(input_ids, scores, **kwargs),
            lambda ends: torch.as_tensor(ends, device=input_ids.device).tolist(),
        )
        return torch.as_tensor(ends, device=input_ids.device, dtype=torch.bool).expand(len(input_ids))


def _together(own: Any, call: Callable[[], Any], tell: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What ``call`` gives here, and what the first rank tells of its own.

    Raises:
        RuntimeError: The function has failed on a rank; it is raised on all of them.
    """
    error: Exception | None = None
    found = told = None
    try:
        found = call()
        told = tell(found)
    except Exception as raised:
        error = raised
    everyone = collectives.gather((None if error is None else repr(error), told), process_groups.model_parallel())
    for text, _ in everyone:
        if text is not None:
            raise RuntimeError(f"generate: {type(own).__name__} has failed with {text}.") from error
    return found, everyone[0][1]
