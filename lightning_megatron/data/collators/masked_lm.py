"""The collator of masked language modelling: it pads samples, and masks tokens or whole words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_megatron.data.collators.random_draws import Draws, ids_of, padded
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

IGNORED_LABEL = -100


@answer_wrong_names
class MaskedLMCollator:
    """Makes batches for ``BertModule`` from tokenised samples, with new masks each time (Devlin et al., 2018, 3.1).

    By default 80 % of the chosen tokens become the mask, 10 % a random id, and 10 % stay. ``labels`` are −100 except
    at chosen tokens. Model-parallel ranks draw the same masks, and each batch has new ones (see ``Draws``).

    Args:
        vocab_size: Number of ids; random ids are drawn below it.
        mask_id: Id of the mask token.
        pad_id: Id that fills short samples.
        special_ids: Ids that are neither masked nor drawn.
        probability: Share of the other tokens that is chosen.
        mask_share: Share of the chosen tokens that becomes the mask.
        random_share: Share of the chosen tokens that becomes a random id.
        continuation_ids: Ids of tokens that continue the word before them ("##ing"). With them, whole words are chosen;
            with None, single tokens.
        seed: Seed of the random draws.
        pad_to_multiple_of: The length of a batch is rounded up to a multiple of this.

    Raises:
        ValueError: A share is not between 0 and 1, or the special ids leave no id to draw.
    """

    def __init__(
        self,
        vocab_size: int,
        mask_id: int,
        pad_id: int = 0,
        special_ids: Collection[int] = (),
        probability: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        continuation_ids: Collection[int] | None = None,
        seed: int = 0,
        pad_to_multiple_of: int = 1,
    ) -> None:
        arguments = Arguments("MaskedLMCollator")
        arguments.whole(vocab_size=vocab_size, pad_to_multiple_of=pad_to_multiple_of)
        arguments.whole(None, mask_id=mask_id, pad_id=pad_id, seed=seed)
        arguments.number(probability=probability, mask_share=mask_share, random_share=random_share)
        if not 0 < probability <= 1:
            raise ValueError(f"MaskedLMCollator(probability={probability}): use a share above 0, up to 1.")
        if min(mask_share, random_share) < 0 or mask_share + random_share > 1:
            raise ValueError(
                f"MaskedLMCollator(mask_share={mask_share}, random_share={random_share}): use shares that sum to 1 or"
                " less; the other chosen tokens stay as they are."
            )
        if not 0 <= mask_id < vocab_size:
            raise ValueError(f"MaskedLMCollator(mask_id={mask_id}) is outside of vocab_size={vocab_size}.")
        self.mask_id = mask_id
        self.pad_id = pad_id
        self.special_ids = np.asarray(sorted({*special_ids, pad_id, mask_id}))
        self.drawn_ids = np.setdiff1d(np.arange(vocab_size), self.special_ids)
        if not len(self.drawn_ids):
            raise ValueError(f"MaskedLMCollator(vocab_size={vocab_size}): all ids are special, none can be drawn.")
        self.probability = probability
        self.mask_share = mask_share
        self.random_share = random_share
        self.continuation_ids = None if continuation_ids is None else np.asarray(sorted(continuation_ids))
        self.pad_to_multiple_of = pad_to_multiple_of
        self._draws = Draws(seed)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, whole_words: bool = False, **options: Any) -> MaskedLMCollator:
        """Make a collator with the ids of a transformers tokenizer.

        Args:
            tokenizer: The tokenizer, which has a mask token and a padding token.
            whole_words: Whether whole words are chosen, which WordPiece's "##" tells.
            **options: Further arguments of ``MaskedLMCollator``.

        Raises:
            ValueError: The tokenizer lacks one of the two tokens, or has no "##" pieces for ``whole_words``.
        """
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError(
                f"MaskedLMCollator: {type(tokenizer).__name__} has mask_token={tokenizer.mask_token!r} and"
                f" pad_token={tokenizer.pad_token!r}; both are needed. Add them with add_special_tokens."
            )
        if whole_words:
            pieces = [id_ for token, id_ in tokenizer.get_vocab().items() if token.startswith("##")]
            if not pieces:
                raise ValueError(
                    f"MaskedLMCollator(whole_words=True): {type(tokenizer).__name__} has no '##' before any piece."
                    " Give continuation_ids to MaskedLMCollator itself."
                )
            options["continuation_ids"] = pieces
        return cls(
            len(tokenizer),
            tokenizer.mask_token_id,
            tokenizer.pad_token_id,
            special_ids=tokenizer.all_special_ids,
            **options,
        )

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad and mask samples.

        Args:
            samples: Mappings with ``input_ids`` ``[s]``, optional ``token_type_ids`` ``[s]``, and numbers such as
                ``next_sentence_label``. Samples of several texts have ``seq_idx`` ``[s]``, the number of each token's
                text, or ``cu_seqlens``, where texts begin and the last one ends. Other sequences are left out.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels``, ``token_type_ids`` and ``seq_idx`` ``[b, s]``, ``cu_seqlens``
            ``[b, n]``, and the numbers ``[b]``. Padding is a text of its own.

        Raises:
            ValueError: A sample is empty.
        """
        rows = ids_of("MaskedLMCollator", samples)
        length = max(map(len, rows))
        length += -length % self.pad_to_multiple_of
        ids = padded(rows, length, self.pad_id)
        inputs, labels = self._mask(ids, self._draws.generator(rows))
        batch = {
            "input_ids": torch.from_numpy(inputs),
            "attention_mask": torch.from_numpy(padded([np.ones_like(row) for row in rows], length, 0)),
            "labels": torch.from_numpy(labels),
        }
        for key in samples[0]:
            if key == "token_type_ids":
                types = [np.asarray(sample[key], dtype=np.int64) for sample in samples]
                batch[key] = torch.from_numpy(padded(types, length, 0))
            elif key in ("seq_idx", "cu_seqlens"):
                each = [np.asarray(sample[key], dtype=np.int64) for sample in samples]
                make = _numbers if key == "seq_idx" else _borders
                batch[key] = torch.from_numpy(make(each, length))
            elif key not in batch and np.ndim(samples[0][key]) == 0:
                batch[key] = torch.from_numpy(np.asarray([sample[key] for sample in samples]))
        return batch

    def _mask(self, ids: np.ndarray, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = self._choose(ids, draws)
        fate = draws.random(ids.shape)
        random_ids = draws.choice(self.drawn_ids, ids.shape)
        inputs = np.where(chosen & (fate < self.mask_share), self.mask_id, ids)
        randomised = chosen & (fate >= self.mask_share) & (fate < self.mask_share + self.random_share)
        return np.where(randomised, random_ids, inputs), np.where(chosen, ids, IGNORED_LABEL)

    def _choose(self, ids: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        """Choose the tokens to predict: ``[b, s]``, True at these tokens."""
        special = np.isin(ids, self.special_ids)
        lots = draws.random(ids.shape)
        if self.continuation_ids is not None:  # all tokens of a word are chosen with its first one
            after_special = np.pad(special[:, :-1], ((0, 0), (1, 0)), constant_values=True)
            starts = ~np.isin(ids, self.continuation_ids) | after_special
            first = np.maximum.accumulate(np.where(starts, np.arange(ids.shape[1]), 0), axis=1)
            lots = np.take_along_axis(lots, first, axis=1)
        return (lots < self.probability) & ~special


def _numbers(rows: list[np.ndarray], length: int) -> np.ndarray:
    """``[b, length]``, the number of each token's text; that of padding is another one."""
    return np.stack([np.pad(row, (0, length - len(row)), constant_values=row.max() + 1) for row in rows])


def _borders(rows: list[np.ndarray], length: int) -> np.ndarray:
    """``[b, n]``, the borders of texts, of which the last is where the padding ends; -1 stands behind them."""
    ended = [row if row[-1] == length else np.append(row, length) for row in rows]
    return padded(ended, max(map(len, ended)), -1)
