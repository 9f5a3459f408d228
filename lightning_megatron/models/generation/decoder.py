"""Next-token scores from GPT's and T5's chunks, over all ranks, a few tokens at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from lightning_megatron.models.generation.kv_cache import KeyValueCache
from lightning_megatron.models.generation.pipeline import Stages
from lightning_megatron.models.generation.prompts import Prompts
from lightning_megatron.models.t5.layer_spec import EncoderStates


class Decoder(ABC):
    """Scores of the next token of each text; remembers keys and values of the texts of the last call.

    Args:
        stages: The chunks.
        start: What the texts begin with.
        vocab_size: Token ids that occur.
        max_new_tokens: At most so many are added.
        beams: Texts of each prompt.
    """

    def __init__(self, stages: Stages, start: Prompts, vocab_size: int, max_new_tokens: int, beams: int) -> None:
        self.stages = stages
        self.start = start
        self.vocab_size = vocab_size
        rows = len(start.ids) * beams
        self.cache = KeyValueCache(rows, beams, start.ids.size(1) + max_new_tokens)

    def scores(self, texts: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, vocab]`` of the token behind each of the texts ``[rows, s]``, the same on every rank."""
        tokens = self.cache.take(texts)
        found = self.run(tokens)  # [rows, 1, vocab/tp or vocab]
        self.cache.advance(tokens.size(1))
        shape = (len(texts), self.vocab_size)
        last = None if found is None else found[:, -1, : self.vocab_size].float()
        return self.stages.share(last, self.stages.count - 1, shape, torch.float32)

    @abstractmethod
    def run(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits ``[rows, new, padded vocab]`` behind new tokens, on the last stage; None on others."""


class GPTDecoder(Decoder):
    """Of megatron-core's ``GPTModel``; as ``Decoder``."""

    def __init__(self, stages: Stages, start: Prompts, vocab_size: int, max_new_tokens: int, beams: int) -> None:
        super().__init__(stages, start, vocab_size, max_new_tokens, beams)
        padding = (~start.keep).sum(dim=1, keepdim=True).repeat_interleave(beams, dim=0)  # [rows, 1]
        self.padding = padding if bool(padding.any()) else None

    def run(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """As ``Decoder``; padding is masked, and does not count as a position."""
        first = self.cache.sequence_len_offset
        places = torch.arange(first, first + tokens.size(1), device=tokens.device)
        positions, mask = places.expand_as(tokens), None
        if self.padding is not None:
            positions = (places - self.padding).clamp(min=0)
            keys = torch.arange(first + tokens.size(1), device=tokens.device)
            padded = (keys < self.padding)[:, None, None]  # [rows, 1, 1, keys]
            mask = ((keys > places[:, None]) | padded) & (keys != places[:, None])  # a softmax needs one key

        def run(_: int, chunk: Any) -> torch.Tensor:
            output: torch.Tensor = chunk(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=mask,
                inference_context=self.cache,
                runtime_gather_output=True,
            )
            return output

        width = self.stages.chunks[0].config.hidden_size
        return self.stages.relay(range(self.stages.count), (tokens.size(1), len(tokens), width), run)


class T5Decoder(Decoder):
    """Of ``T5Model``; encodes the prompts at once, and keeps each layer's keys and values of them.

    Args:
        stages: The chunks.
        prompts: The encoder's input.
        start: What the decoder begins with.
        vocab_size: Token ids that occur.
        max_new_tokens: At most so many are added.
        beams: Texts of each prompt.
        split: First stage of the decoder; 0 where there is one stage.
    """

    def __init__(
        self,
        stages: Stages,
        prompts: Prompts,
        start: Prompts,
        vocab_size: int,
        max_new_tokens: int,
        beams: int,
        split: int,
    ) -> None:
        super().__init__(stages, start, vocab_size, max_new_tokens, beams)
        numbers = range(stages.count)
        self.path: Sequence[int] = [0, *numbers[split:]] if split else numbers
        mask = None if bool(prompts.keep.all()) else ~prompts.keep[:, None, None]  # [b, 1, 1, se]
        width = stages.chunks[0].config.hidden_size
        shape = (prompts.ids.size(1), len(prompts.ids), width)
        last = max(split - 1, 0)
        encoded = stages.relay(numbers[: last + 1], shape, lambda _, chunk: chunk.encode(prompts.ids, mask))
        encoded = stages.share(encoded, last, shape, stages.dtype)  # [se, b, h]
        self.encoded = EncoderStates(encoded.repeat_interleave(beams, dim=1))
        self.mask = None if mask is None else mask.repeat_interleave(beams, dim=0)

    def run(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """As ``Decoder``."""
        width = self.stages.chunks[0].config.hidden_size
        return self.stages.relay(
            self.path,
            (tokens.size(1), len(tokens), width),
            lambda _, chunk: chunk.decode(tokens, self.encoded, self.mask, self.cache),
        )
