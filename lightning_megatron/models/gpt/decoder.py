"""Next-token scores of a GPT, with its keys and values cached."""

from __future__ import annotations

from typing import Any

import torch

from lightning_megatron.models.generation import Decoder, Prompts, Stages


class GPTDecoder(Decoder):
    """Next-token scores of megatron-core's ``GPTModel``; arguments as ``Decoder``."""

    def __init__(self, stages: Stages, start: Prompts, vocab_size: int, max_new_tokens: int, beams: int) -> None:
        super().__init__(stages, start, vocab_size, max_new_tokens, beams)
        padding = (~start.keep).sum(dim=1, keepdim=True).repeat_interleave(beams, dim=0)  # [rows, 1]
        self.padding = padding if bool(padding.any()) else None

    def run_idle(self, tokens: torch.Tensor) -> None:
        """Run the model on tokens that belong to no text."""
        self.padding = None
        super().run_idle(tokens)

    def run(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Run the model on the new tokens; padding is masked, and does not count as a position."""
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
