"""The collator of sentence pairs for BERT: two segments of text, and whether the second one follows the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from lightning_megatron.data.collators.masked_lm import MaskedLMCollator
from lightning_megatron.data.collators.random_draws import Draws
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

# The token ids of a sentence or segment.
Ids = np.ndarray


@answer_wrong_names
class SentencePairCollator:
    """Makes batches for ``BertConfig(task="pretraining")`` from documents that are lists of sentences.

    It takes as many sentences as fit, from a random one on, and cuts them into two segments between two random
    sentences. In half of the samples the second segment does not follow the first, and ``next_sentence_label`` is 1:
    with ``negatives="random"`` it is from another document of the batch (next sentence prediction: Devlin et al., 2018,
    appendix A.2); with ``"swapped"`` the two segments change places (sentence order prediction: Lan et al., 2020,
    section 3.1; Megatron's datasets do the same). Segments that are too long lose tokens at the front or the back, at
    random. Then ``masking`` masks and pads.

    Args:
        masking: The collator that makes a batch from the pairs.
        cls_id: Id of the token before the first segment.
        sep_id: Id of the token behind each segment.
        seq_length: Tokens of a sample, including the three special ones.
        negatives: "random" or "swapped".
        seed: Seed of the random draws.

    Raises:
        ValueError: ``seq_length`` has no room for a token of each segment, or ``negatives`` is unknown.
    """

    def __init__(
        self,
        masking: MaskedLMCollator,
        cls_id: int,
        sep_id: int,
        seq_length: int,
        negatives: Literal["random", "swapped"] = "random",
        seed: int = 0,
    ) -> None:
        Arguments("SentencePairCollator").whole(None, seq_length=seq_length, cls_id=cls_id, sep_id=sep_id, seed=seed)
        if seq_length < 5:
            raise ValueError(
                f"SentencePairCollator(seq_length={seq_length}): use 5 or more, two tokens and three special ones."
            )
        if negatives not in ("random", "swapped"):
            raise ValueError(f"SentencePairCollator(negatives={negatives!r}): use 'random' or 'swapped'.")
        for name, id_ in (("cls_id", cls_id), ("sep_id", sep_id)):
            if id_ not in masking.special_ids:
                raise ValueError(
                    f"SentencePairCollator({name}={id_}): it is not among the masking's special_ids, so it would be"
                    " masked. Add it there."
                )
        self.masking = masking
        self.cls_id = cls_id
        self.sep_id = sep_id
        self.seq_length = seq_length
        self.negatives = negatives
        self._draws = Draws(seed)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, seq_length: int, masking: MaskedLMCollator | None = None, **options: Any
    ) -> SentencePairCollator:
        """Make a collator with the ids of a transformers tokenizer.

        Args:
            tokenizer: The tokenizer, which has BERT's special tokens.
            seq_length: Tokens of a sample, including the three special ones.
            masking: The collator that masks and pads; by default ``MaskedLMCollator.from_tokenizer(tokenizer)``.
            **options: Further arguments of ``SentencePairCollator``.

        Raises:
            ValueError: The tokenizer lacks one of the special tokens.
        """
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise ValueError(
                f"SentencePairCollator: {type(tokenizer).__name__} has cls_token={tokenizer.cls_token!r} and"
                f" sep_token={tokenizer.sep_token!r}; both are needed. Add them with add_special_tokens."
            )
        masking = MaskedLMCollator.from_tokenizer(tokenizer) if masking is None else masking
        return cls(masking, tokenizer.cls_token_id, tokenizer.sep_token_id, seq_length, **options)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make pairs from documents, mask and pad them.

        Args:
            samples: The documents: mappings with ``sentences``, a list of two or more lists of ids.

        Returns:
            The batch of ``masking`` with ``token_type_ids`` ``[b, s]`` and ``next_sentence_label`` ``[b]``.

        Raises:
            ValueError: A document is empty or cannot be cut in two, or the batch has no other document to draw from.
        """
        documents = [_sentences(sample, number) for number, sample in enumerate(samples)]
        if self.negatives == "random" and len(documents) < 2:
            raise ValueError(
                "SentencePairCollator(negatives='random') takes second segments from the other documents of a batch,"
                " and this one has none. Use batches of two or more, or negatives='swapped'."
            )
        draws = self._draws.generator([np.concatenate(document) for document in documents])
        return self.masking([self._pair(documents, number, draws) for number in range(len(documents))])

    def _pair(self, documents: list[list[Ids]], number: int, draws: np.random.Generator) -> dict[str, Any]:
        room = self.seq_length - 3
        chunk = _chunk(documents[number], room, draws)
        pivot = int(draws.integers(1, len(chunk)))
        first, second = np.concatenate(chunk[:pivot]), np.concatenate(chunk[pivot:])
        negative = bool(draws.random() < 0.5)
        if negative and self.negatives == "random":
            other = documents[(number + int(draws.integers(1, len(documents)))) % len(documents)]
            start = int(draws.integers(len(other)))
            second = np.concatenate(other[start:])[: max(room - len(first), 1)]
        elif negative:
            first, second = second, first
        first, second = _trimmed(first, second, room, draws)
        ids = np.concatenate([[self.cls_id], first, [self.sep_id], second, [self.sep_id]])
        types = np.repeat([0, 1], [len(first) + 2, len(second) + 1])
        return {"input_ids": ids, "token_type_ids": types, "next_sentence_label": int(negative)}


def _sentences(sample: Mapping[str, Any], number: int) -> list[Ids]:
    sentences = [np.asarray(ids, dtype=np.int64) for ids in sample["sentences"] if len(ids)]
    if not sentences:
        raise ValueError(
            f"SentencePairCollator: sample {number} of this batch is an empty document. Leave empty documents out of"
            " the data set."
        )
    if len(sentences) < 2:
        raise ValueError(
            f"SentencePairCollator: sample {number} of this batch has one sentence, and a pair takes two. Leave such"
            " documents out of the data set, or split sentences finer."
        )
    return sentences


def _chunk(sentences: list[Ids], room: int, draws: np.random.Generator) -> list[Ids]:
    """Take two or more successive sentences, from a random one on, until they fill ``room`` tokens."""
    start = int(draws.integers(len(sentences) - 1))
    stop, tokens = start, 0
    while stop < len(sentences) and (tokens < room or stop < start + 2):
        tokens += len(sentences[stop])
        stop += 1
    return sentences[start:stop]


def _trimmed(first: Ids, second: Ids, room: int, draws: np.random.Generator) -> tuple[Ids, Ids]:
    """Take tokens from either end of the longer segment until both fit into ``room``."""
    cuts = [[0, len(first)], [0, len(second)]]
    for _ in range(len(first) + len(second) - room):
        longer = max(cuts, key=lambda cut: cut[1] - cut[0])
        if draws.random() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return first[slice(*cuts[0])], second[slice(*cuts[1])]
