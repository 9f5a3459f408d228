"""``Decoder``: next-token scores from the chunks of a model, over all its ranks; each family has its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lightning_megatron.distributed import process_groups
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

    Attributes:
        runs_in_step: Whether replicas hold layers together, so that a pass needs all of them.
    """

    runs_in_step = False

    def __init__(self, stages: Stages, start: Prompts, vocab_size: int, max_new_tokens: int, beams: int) -> None:
        self.stages = stages
        self.start = start
        self.vocab_size = vocab_size
        rows = len(start.ids) * beams
        self.cache = KeyValueCache(rows, beams, start.ids.size(1) + max_new_tokens)

    def scores(self, texts: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, vocab]`` of the token behind each of the texts ``[rows, s]``, the same on every rank."""
        self._any_writes(True)
        tokens = self.cache.take(texts)
        found = self.run(tokens)  # [rows, 1, vocab/tp or vocab]
        self.cache.advance(tokens.size(1))
        shape = (len(texts), self.vocab_size)
        last = None if found is None else found[:, -1, : self.vocab_size].float()
        return self.stages.share(last, self.stages.count - 1, shape, torch.float32)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Run passes; behind them, take part in those of the replicas that still write, also after an error."""
        try:
            yield
        except Exception:
            self._take_part()
            raise
        self._take_part()

    def _take_part(self) -> None:
        while self.runs_in_step and self._any_writes(False):
            self.cache = KeyValueCache(1, 1, 1)
            self.run_idle(torch.zeros(1, 1, dtype=torch.long, device=self.stages.device))

    def _any_writes(self, here: bool) -> bool:
        """Tell the other replicas whether this one writes; whether any of them does."""
        if not self.runs_in_step:
            return here
        count = torch.full((), float(here), device=self.stages.device)
        dist.all_reduce(count, group=process_groups.replicas())
        return here or bool(count > 0)

    def run_idle(self, tokens: torch.Tensor) -> None:
        """Run the model on tokens that belong to no text."""
        self.run(tokens)

    @abstractmethod
    def run(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits ``[rows, new, padded vocab]`` behind new tokens, on the last stage; None on others."""
