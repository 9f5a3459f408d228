"""``Decoder``: next-token scores from the chunks of a model, over all its ranks; each family has its own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from lightning_megatron.models.generation.kv_cache import KeyValueCache
from lightning_megatron.models.generation.pipeline import Stages
from lightning_megatron.models.generation.prompts import Prompts


class Decoder(ABC):
    """Scores of the next token of each text; remembers keys and values of the texts of the last call.

    Args:
        stages: The chunks.
        start: The tokens that the texts begin with.
        vocab_size: Number of token ids, without padding of the vocabulary.
        max_new_tokens: The largest number of tokens that are added.
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
