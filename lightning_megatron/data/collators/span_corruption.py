"""The collator of span corruption for T5: sentinels replace spans of the inputs, and the labels are the spans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_megatron.data.collators.masked_lm import IGNORED_LABEL
from lightning_megatron.data.collators.random_draws import Draws, ids_of, padded
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


@answer_wrong_names
class SpanCorruptionCollator:
    """Makes batches for ``T5Module`` from samples, with new spans each time (Raffel et al., 2020, section 3.1.4).

    A share ``noise_density`` of the tokens is taken out, in spans of ``mean_span_length`` tokens on average. Spans lie
    as in T5's own ``random_spans_noise_mask``: a sample begins with kept tokens and ends with a span. The inputs have a
    sentinel in place of each span; the labels have each sentinel and the tokens of its span. Both end with ``eos_id``.
    Model-parallel ranks draw the same spans, and each batch has new ones (see ``Draws``).

    Args:
        sentinel_ids: Ids of the sentinels, in the order of their use: T5's ``<extra_id_0>``, ``<extra_id_1>``, ...
        seq_length: Tokens of a sample before the corruption; longer samples are cut.
        eos_id: Id at the end of inputs and labels. If a sample ends with it, it is taken off before the corruption.
        pad_id: Id that fills short inputs.
        noise_density: Share of the tokens that is taken out.
        mean_span_length: Mean number of tokens in a span.
        seed: Seed of the random draws.
        pad_to_multiple_of: The lengths of inputs and of labels are rounded up to a multiple of this.

    Raises:
        ValueError: A share or a length is out of range, or there are fewer sentinels than spans in a sample.
    """

    def __init__(
        self,
        sentinel_ids: Sequence[int],
        seq_length: int,
        eos_id: int = 1,
        pad_id: int = 0,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        seed: int = 0,
        pad_to_multiple_of: int = 1,
    ) -> None:
        if not 0 < noise_density < 1:
            raise ValueError(f"SpanCorruptionCollator(noise_density={noise_density}): use a share between 0 and 1.")
        if mean_span_length < 1:
            raise ValueError(f"SpanCorruptionCollator(mean_span_length={mean_span_length}): use 1 or more.")
        arguments = Arguments("SpanCorruptionCollator")
        arguments.whole(None, seq_length=seq_length, eos_id=eos_id, pad_id=pad_id, seed=seed)
        if seq_length < 2:
            raise ValueError(f"SpanCorruptionCollator(seq_length={seq_length}): use 2 or more; one token stays.")
        self.sentinel_ids = np.asarray(sentinel_ids, dtype=np.int64)
        self.seq_length = seq_length
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.noise_density = noise_density
        self.mean_span_length = mean_span_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self._draws = Draws(seed)
        _, spans = self._amounts(seq_length)
        if spans > len(self.sentinel_ids):
            raise ValueError(
                f"SpanCorruptionCollator: {len(self.sentinel_ids)} sentinels, and a sample of seq_length={seq_length}"
                f" has {spans} spans. Add {spans - len(self.sentinel_ids)} or more to the tokenizer"
                f" (<extra_id_0> to <extra_id_{spans - 1}>), or use a smaller seq_length or noise_density, or a larger"
                " mean_span_length."
            )

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, seq_length: int, **options: Any) -> SpanCorruptionCollator:
        """Make a collator with the ids of a transformers tokenizer: its ``<extra_id_N>``, end and padding tokens.

        Args:
            tokenizer: T5's tokenizer, or one with the same special tokens.
            seq_length: Tokens of a sample before the corruption.
            **options: Further arguments of ``SpanCorruptionCollator``.

        Raises:
            ValueError: The tokenizer lacks an end or padding token, or has too few sentinels.
        """
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError(
                f"SpanCorruptionCollator: {type(tokenizer).__name__} has eos_token={tokenizer.eos_token!r} and"
                f" pad_token={tokenizer.pad_token!r}; both are needed. Add them with add_special_tokens."
            )
        return cls(
            sentinels(tokenizer.get_vocab()), seq_length, tokenizer.eos_token_id, tokenizer.pad_token_id, **options
        )

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Corrupt and pad samples.

        Args:
            samples: Mappings with ``input_ids`` ``[s]``.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[b, se]``, and ``labels`` ``[b, sd]``, −100 behind their ends.

        Raises:
            ValueError: A sample has fewer than two tokens, of which one has to stay.
        """
        rows = ids_of("SpanCorruptionCollator", samples)
        draws = self._draws.generator(rows)
        pairs = [self._corrupt(row, number, draws) for number, row in enumerate(rows)]
        inputs, labels = ([pair[side] for pair in pairs] for side in (0, 1))
        length = self._length(inputs)
        return {
            "input_ids": torch.from_numpy(padded(inputs, length, self.pad_id)),
            "attention_mask": torch.from_numpy(padded([np.ones_like(row) for row in inputs], length, 0)),
            "labels": torch.from_numpy(padded(labels, self._length(labels), IGNORED_LABEL)),
        }

    def _length(self, rows: Sequence[np.ndarray]) -> int:
        longest = max(map(len, rows))
        return longest + -longest % self.pad_to_multiple_of

    def _amounts(self, length: int) -> tuple[int, int]:
        """How many tokens are taken out of ``length``, and in how many spans."""
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        spans = min(max(round(noise / self.mean_span_length), 1), noise, length - noise)
        return noise, spans

    def _corrupt(self, ids: np.ndarray, number: int, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and labels of one sample."""
        ids = (ids[:-1] if ids[-1] == self.eos_id else ids)[: self.seq_length]
        if len(ids) < 2:
            raise ValueError(
                f"SpanCorruptionCollator: sample {number} of this batch has {len(ids)} tokens before the end. A sample"
                " needs two, one to keep and one to take out: leave shorter ones out of the data set."
            )
        noise, spans = self._amounts(len(ids))
        kept, taken = _parts(len(ids) - noise, spans, draws), _parts(noise, spans, draws)
        stops = np.cumsum(np.stack([kept, taken], axis=1).ravel())  # kept, span, kept, span, ...
        inputs: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for span, (begin, start, stop) in enumerate(zip([0, *stops[1:-1:2]], stops[::2], stops[1::2], strict=True)):
            sentinel = self.sentinel_ids[span : span + 1]
            inputs += [ids[begin:start], sentinel]
            labels += [sentinel, ids[start:stop]]
        return (np.concatenate([*inputs, [self.eos_id]]), np.concatenate([*labels, [self.eos_id]]))


def sentinels(vocabulary: Mapping[str, int]) -> list[int]:
    """The ids of ``<extra_id_0>``, ``<extra_id_1>``, ... in a vocabulary, in this order."""
    found = {int(match[1]): id_ for token, id_ in vocabulary.items() if (match := _SENTINEL.fullmatch(token))}
    return [found[number] for number in sorted(found)]


def _parts(total: int, parts: int, draws: np.random.Generator) -> np.ndarray:
    """Draw ``parts`` positive numbers that sum to ``total``, every such choice equally likely."""
    cuts = np.sort(draws.choice(np.arange(1, total), parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))
