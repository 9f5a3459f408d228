"""The kinds of samples of indexed data, for GPT, BERT and T5; megatron-core's datasets make each of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from lightning_megatron.data.collators.masked_lm import IGNORED_LABEL
from lightning_megatron.data.collators.span_corruption import sentinels
from lightning_megatron.data.indexed.index_builder import PAD
from lightning_megatron.data.special_tokens import special_ids, vocabulary
from lightning_megatron.data.tokenizers import Tokenizer
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

Sample = dict[str, Any]

# megatron-core's build_mapping leaves out documents that have a longer sentence (helpers.cpp, LONG_SENTENCE_LEN).
LONGEST_SENTENCE = 512


class IndexedSamples(ABC):
    """The base class of the kinds of samples: ``GPTSamples``, ``BertSamples`` and ``T5Samples``."""

    kind: ClassVar[Literal["gpt", "bert", "t5"]]
    seq_length: int

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The arguments of megatron-core's config class."""

    @abstractmethod
    def tokenizer_fields(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The attributes of the tokenizer that megatron-core's dataset reads, as plain data.

        Raises:
            ValueError: The tokenizer lacks one of them.
        """

    @abstractmethod
    def convert(self, sample: Sample) -> Sample:
        """Convert a sample of the dataset to the form that the modules take."""

    @abstractmethod
    def too_little(self, data: IndexedDataset, begin: float, end: float) -> str | None:
        """Say why there is no sample between these shares of the data, or return an empty text."""


@answer_wrong_names
class GPTSamples(IndexedSamples):
    """Samples of ``seq_length`` successive tokens, which may span several documents, in a shuffled order.

    Batches have ``tokens``, ``labels`` (the next tokens), ``loss_mask`` and ``position_ids`` ``[b, s]``.

    Args:
        seq_length: Tokens that the model sees at once.
        reset_position_ids: Whether positions start at 0 in each document.
        reset_attention_mask: Whether a token attends only to tokens of its own document. With both arguments,
            ``position_ids`` say where a document begins. With one of them, batches have ``attention_mask``
            ``[b, 1, s, s]`` beside them, True where a query may not attend; memory then grows with s².
        eod_mask_loss: Whether the token after the end of a document is left out of the loss.

    Raises:
        ValueError: ``seq_length`` is not positive.
    """

    kind = "gpt"

    def __init__(
        self,
        seq_length: int,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
    ) -> None:
        arguments = Arguments("GPTSamples")
        arguments.whole(seq_length=seq_length)
        arguments.flag(reset_position_ids=reset_position_ids, reset_attention_mask=reset_attention_mask)
        arguments.flag(eod_mask_loss=eod_mask_loss)
        self.seq_length = seq_length
        self.reset_position_ids = reset_position_ids
        self.reset_attention_mask = reset_attention_mask
        self.eod_mask_loss = eod_mask_loss

    def options(self) -> dict[str, Any]:
        """The arguments of ``GPTDatasetConfig``."""
        return {
            "reset_position_ids": self.reset_position_ids,
            "reset_attention_mask": self.reset_attention_mask,
            "eod_mask_loss": self.eod_mask_loss,
            # Positions that begin anew are separate documents to ``GPTModule``, unless there is a mask.
            "create_attention_mask": self.reset_attention_mask != self.reset_position_ids,
        }

    def tokenizer_fields(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The id that ends a document."""
        return {"identity": tokenizer.identity, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod_id}

    def convert(self, sample: Sample) -> Sample:
        """Return the sample unchanged."""
        return {name: value for name, value in sample.items() if name != "dataset_id"}

    def too_little(self, data: IndexedDataset, begin: float, end: float) -> str | None:
        """Say why there is no sample; a sample takes one token more than the model sees."""
        start, stop = (round(share * len(data.sequence_lengths)) for share in (begin, end))
        tokens = int(data.sequence_lengths[start:stop].sum(dtype=np.int64))
        if tokens > self.seq_length:
            return None
        return (
            f"its {stop - start} of {len(data.sequence_lengths)} documents have {tokens} tokens, and a sample takes"
            f" seq_length + 1 = {self.seq_length + 1}"
        )


class _Masked(IndexedSamples):
    """The base of BERT's and T5's samples, which are whole sentences of one document, up to a length."""

    minimum_sentences: int

    def __init__(
        self,
        seq_length: int,
        masking_probability: float,
        short_sequence_probability: float,
        max_ngram: int,
        whole_words: bool,
    ) -> None:
        _check_masking(type(self).__name__, seq_length, masking_probability, short_sequence_probability, max_ngram)
        self.seq_length = seq_length
        self.masking_probability = masking_probability
        self.short_sequence_probability = short_sequence_probability
        self.max_ngram = max_ngram
        self.whole_words = whole_words

    def options(self) -> dict[str, Any]:
        """The arguments that the configurations of both datasets have."""
        return {
            "masking_probability": self.masking_probability,
            "short_sequence_probability": self.short_sequence_probability,
            "masking_max_ngram": self.max_ngram,
            "masking_do_full_word": self.whole_words,
            "masking_do_permutation": False,
            "masking_use_longer_ngrams": False,
        }

    def convert(self, sample: Sample) -> Sample:
        """Keep the named arrays as tensors, and set labels that are not learnt to −100."""
        names = self.names
        found = {names[name]: torch.as_tensor(value, device="cpu") for name, value in sample.items() if name in names}
        found["labels"] = found["labels"].masked_fill(found["loss_mask"] == 0, IGNORED_LABEL)
        return found

    @property
    @abstractmethod
    def names(self) -> dict[str, str]:
        """The keys that are kept, with their names in the batch."""

    def too_little(self, data: IndexedDataset, begin: float, end: float) -> str | None:
        """Say why there is no sample; megatron-core would look for one for ever."""
        bounds = data.document_indices
        start, stop = (round(share * (len(bounds) - 1)) for share in (begin, end))
        sizes = np.diff(bounds[start : stop + 1])
        enough = sizes >= self.minimum_sentences
        if stop <= start or not enough.any():
            return (
                f"of its {stop - start} of {len(bounds) - 1} documents none has {self.minimum_sentences} sentences;"
                " make the data with `lightning-megatron preprocess --split-sentences`"
            )
        longest = np.maximum.reduceat(data.sequence_lengths[: bounds[stop]], bounds[start:stop])
        if not (enough & ((longest <= LONGEST_SENTENCE) | (sizes == 1))).any():
            return (
                f"each of its {stop - start} documents has a sentence of more than {LONGEST_SENTENCE} tokens, and"
                " megatron-core leaves such documents out; split sentences finer"
            )
        return None


@answer_wrong_names
class BertSamples(_Masked):
    """Samples for BERT: two segments of whole sentences, swapped in half of the samples, with masked n-grams of words.

    Batches have ``text``, ``types``, ``padding_mask``, ``labels`` and ``loss_mask`` ``[b, s]``, and ``is_random``
    ``[b]``, which tells whether the segments were swapped. The sample's index seeds its masks.

    Args:
        seq_length: Tokens of a sample, including [CLS] and two [SEP].
        binary_head: Whether samples are pairs of segments. Documents then need two sentences. Without it, batches have
            no ``is_random``.
        masking_probability: Share of the tokens to predict; 80 % of them become [MASK], 10 % a random id.
        short_sequence_probability: Share of the samples that are cut to a shorter, random length.
        max_ngram: The largest number of words that are masked together; n words are chosen 1/n as often as one.
        whole_words: Whether whole words are masked, which WordPiece's "##" tells. For other tokenizers, each token is
            a word.

    Raises:
        ValueError: A number is out of range.
    """

    kind = "bert"

    def __init__(
        self,
        seq_length: int,
        binary_head: bool = True,
        masking_probability: float = 0.15,
        short_sequence_probability: float = 0.1,
        max_ngram: int = 3,
        whole_words: bool = True,
    ) -> None:
        super().__init__(seq_length, masking_probability, short_sequence_probability, max_ngram, whole_words)
        Arguments("BertSamples").flag(binary_head=binary_head)
        self.binary_head = binary_head
        self.minimum_sentences = 2 if binary_head else 1

    @property
    def names(self) -> dict[str, str]:
        """The keys that are kept, under their own names."""
        kept = ["text", "types", "labels", "padding_mask", "loss_mask", *["is_random"] * self.binary_head]
        return {name: name for name in kept}

    def options(self) -> dict[str, Any]:
        """The arguments of ``BERTMaskedWordPieceDatasetConfig``."""
        ours = {"masking_use_geometric_distribution": False, "classification_head": self.binary_head}
        return {**super().options(), **ours}

    def tokenizer_fields(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The ids of BERT's special tokens, and all tokens by their ids."""
        return {**_named(tokenizer), **special_ids(tokenizer, "cls", "sep", "mask")}

    def convert(self, sample: Sample) -> Sample:
        """Also set types and mask to 0 on padding, where megatron-core has written the padding's id."""
        found = super().convert(sample)
        found["padding_mask"] = (found["padding_mask"] != PAD).long()
        found["types"] = found["types"].clamp(min=0)
        return found


@answer_wrong_names
class T5Samples(_Masked):
    """Samples for T5: sentences in which sentinels replace spans, and these spans for the decoder.

    Batches have ``text_enc`` and ``attention_mask`` ``[b, se]``, and ``text_dec``, ``labels``, ``loss_mask`` and
    ``decoder_attention_mask`` ``[b, sd]``. The sample's index seeds its spans. Their lengths are geometric as in
    SpanBERT (Joshi et al., 2020, section 3.1): about four words on average where up to 10 are allowed.

    Args:
        seq_length: Number of tokens of the encoder.
        decoder_seq_length: Number of tokens of the decoder. By default the most that a sample can need, rounded up to a
            multiple of 8: about 0.31 of ``seq_length``.
        masking_probability: Share of the tokens that is taken out.
        short_sequence_probability: Share of the samples that are cut to a shorter, random length.
        max_ngram: The largest number of words in a span.
        whole_words: Whether whole words are taken out, which WordPiece's "##" tells. For other tokenizers, each token
            is a word.

    Raises:
        ValueError: A number is out of range.
    """

    kind = "t5"
    minimum_sentences = 1

    def __init__(
        self,
        seq_length: int,
        decoder_seq_length: int | None = None,
        masking_probability: float = 0.15,
        short_sequence_probability: float = 0.1,
        max_ngram: int = 10,
        whole_words: bool = True,
    ) -> None:
        super().__init__(seq_length, masking_probability, short_sequence_probability, max_ngram, whole_words)
        most = max(math.ceil(masking_probability * seq_length), 1)
        self.decoder_seq_length = decoder_seq_length or math.ceil((2 * most + 1) / 8) * 8
        if self.decoder_seq_length <= most + self.most_spans:
            raise ValueError(
                f"T5Samples(decoder_seq_length={decoder_seq_length}): up to {most} of seq_length={seq_length}"
                f" tokens are taken out, in up to {self.most_spans} spans with a sentinel each. Use"
                f" {most + self.most_spans + 1} or more."
            )

    @property
    def most_spans(self) -> int:
        """An upper bound of the spans in a sample: six standard deviations above their mean, or one for each token."""
        most = max(math.ceil(self.masking_probability * self.seq_length), 1)
        mean = most * 0.2 / (1 - 0.8**self.max_ngram)  # lengths are min(geometric(0.2), max_ngram)
        return min(most, math.ceil(mean + 6 * mean**0.5))

    @property
    def names(self) -> dict[str, str]:
        """The keys that are kept; masks have transformers' names, since they are ``[b, s]`` and not pairs of tokens."""
        kept = {name: name for name in ("text_enc", "text_dec", "labels", "loss_mask")}
        return {**kept, "enc_mask": "attention_mask", "dec_mask": "decoder_attention_mask"}

    def options(self) -> dict[str, Any]:
        """The arguments of ``T5MaskedWordPieceDatasetConfig``."""
        ours = {"masking_use_geometric_distribution": True, "sequence_length_decoder": self.decoder_seq_length}
        return {**super().options(), **ours}

    def tokenizer_fields(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The ids of sentinels, beginning and end, and all tokens by their ids.

        Raises:
            ValueError: There are fewer sentinels than a sample can have spans.
        """
        found = sentinels(vocabulary(tokenizer))
        if len(found) < self.most_spans:
            raise ValueError(
                f"T5Samples(seq_length={self.seq_length}): the tokenizer has {len(found)} sentinels, and a sample can"
                f" have {self.most_spans} spans. Add the tokens <extra_id_0> to <extra_id_{self.most_spans - 1}>, or"
                " use a smaller seq_length."
            )
        # T5 has no [CLS], [SEP] or [MASK], but the dataset reads all three.
        none = {"cls": PAD, "sep": PAD, "mask": PAD}
        return {
            **_named(tokenizer),
            **special_ids(tokenizer, "bos", "eos"),
            **none,
            "additional_special_tokens_ids": found,
        }


def _named(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "identity": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod_id,
        "tokens": sorted((id_, token) for token, id_ in vocabulary(tokenizer).items()),
    }


def _check_masking(name: str, seq_length: int, masking: float, short: float, max_ngram: int) -> None:
    arguments = Arguments(name)
    arguments.whole(None, seq_length=seq_length, max_ngram=max_ngram)
    arguments.number(masking_probability=masking, short_sequence_probability=short)
    if seq_length < 8:
        raise ValueError(f"{name}(seq_length={seq_length}) must be at least 8: special tokens take three.")
    if not 0 < masking < 1:
        raise ValueError(f"{name}(masking_probability={masking}) must be a share between 0 and 1.")
    if not 0 <= short <= 1:
        raise ValueError(f"{name}(short_sequence_probability={short}) must be a share from 0 to 1.")
    if max_ngram < 1:
        raise ValueError(f"{name}(max_ngram={max_ngram}) must be at least 1.")
