"""Next-token scores of a T5, whose encoder runs once for all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_megatron.models.generation import Decoder, Prompts, Stages
from lightning_megatron.models.t5.layer_spec import EncoderStates


class T5Decoder(Decoder):
    """Next-token scores of ``T5Model``; it encodes the prompts once, and keeps each layer's keys and values of them.

    Args:
        stages: The chunks.
        prompts: The encoder's input.
        start: The tokens that the decoder begins with.
        vocab_size: Number of token ids, without padding of the vocabulary.
        max_new_tokens: The largest number of tokens that are added.
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
        """Run the decoder's layers on the new tokens."""
        width = self.stages.chunks[0].config.hidden_size
        return self.stages.relay(
            self.path,
            (tokens.size(1), len(tokens), width),
            lambda _, chunk: chunk.decode(tokens, self.encoded, self.mask, self.cache),
        )
