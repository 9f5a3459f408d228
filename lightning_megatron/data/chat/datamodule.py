"""``ChatDataModule``: conversations for fine-tuning, of which the assistant's answers are learnt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from typing_extensions import override

from lightning_megatron.data.chat.encoder import ChatEncoder, LossOn
from lightning_megatron.data.collators.padding import PaddingCollator
from lightning_megatron.data.datamodule import Collator
from lightning_megatron.data.huggingface.datamodule import HFDataModule
from lightning_megatron.data.huggingface.streams import DocumentStream
from lightning_megatron.data.huggingface.whole_texts import CollateWholeTexts, WholeTexts, WholeTextStream
from lightning_megatron.data.tokenizers import ChatTokenizer, Tokenizer
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@answer_wrong_names
class ChatDataModule(HFDataModule):
    """Conversations from JSON lines, parquet or a dataset, for ``GPTModule``.

    A row holds the messages of one conversation: mappings with "role" and "content", as transformers and TRL have them,
    or ShareGPT's with "from" and "value". The tokenizer's chat template makes text of them, with the row's columns
    ``tools`` and ``chat_template_kwargs`` if it has them. Only tokens of the assistant's answers have labels.

    With ``packing``, whole conversations share a row where they fit. None looks at another or has its positions from
    it. Batches are ``input_ids``, ``labels`` and ``position_ids``, int64 ``[batch_size, s]``. Without it, a row is a
    conversation, padded to the longest of its batch, with an ``attention_mask``. In both, s is at most ``seq_length``;
    the end of a longer conversation is cut off, and a conversation without an answer is left out.

    Args:
        dataset: A name on the hub, a reader's name, a path or a dataset, as ``HFDataModule`` takes it.
        config_name: Configuration of a named dataset that has several.
        data_files: The files that a reader reads, or some of the files of a named dataset.
        load_options: Further arguments of ``datasets.load_dataset``.
        streaming: Whether rows are read as they are needed.
        split: The splits for training, validation and test, as ``HFDataModule`` takes them.
        messages_column: The column with the messages.
        prompt_column: The column with messages before them, in which nothing is learnt. For rows of "prompt" and
            "completion", name both.
        tokenizer: A transformers folder, hub name or tokenizer.
        chat_template: A template, or the path of a file with one, in place of the tokenizer's.
        template_options: Further arguments of the template, such as ``{"enable_thinking": False}``.
        loss_on: "assistant": every answer of the assistant is learnt, "last": the last one of each conversation,
            "all": every token.
        seq_length: Tokens that the model sees at once.
        batch_size: Rows of one optimizer step on one data-parallel rank; the strategy cuts them into micro-batches.
        packing: Whether conversations share rows.
        shuffle: Whether training takes the rows in a random order.
        shuffle_block: Number of rows of a stream that are shuffled with each other.
        seed: Seed of the training order.
        drop_last: Whether training leaves out the last rows if they do not fill a batch.
        num_proc: Number of processes that load and tokenise a dataset.
        num_workers: Number of processes that load rows; 0 loads them in the training process.
        cache_dir: A folder in place of the own cache of ``datasets``.

    Raises:
        ValueError: A number is not positive, or ``loss_on`` is unknown.
    """

    def __init__(
        self,
        dataset: str | Path | Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset],
        config_name: str | None = None,
        data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
        load_options: Mapping[str, Any] | None = None,
        streaming: bool = False,
        split: tuple[str | float | None, str | float | None, str | float | None] = ("train", None, None),
        messages_column: str = "messages",
        prompt_column: str | None = None,
        tokenizer: str | Path | Tokenizer = "bytes",
        chat_template: str | Path | None = None,
        template_options: Mapping[str, Any] | None = None,
        loss_on: LossOn = "assistant",
        seq_length: int = 2048,
        batch_size: int = 8,
        packing: bool = True,
        shuffle: bool = True,
        shuffle_block: int = 1000,
        seed: int = 1234,
        drop_last: bool = False,
        num_proc: int | None = None,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        arguments = Arguments(type(self).__name__)
        arguments.one_of(get_args(LossOn), loss_on=loss_on)
        arguments.flag(packing=packing)
        super().__init__(
            dataset, config_name, data_files, load_options, streaming, split, text_column=messages_column,
            tokenizer=tokenizer, seq_length=seq_length, batch_size=batch_size, packing=packing, shuffle=shuffle,
            shuffle_block=shuffle_block, seed=seed, drop_last=drop_last, num_proc=num_proc, num_workers=num_workers,
            cache_dir=cache_dir,
        )  # fmt: skip
        self.prompt_column = prompt_column
        self.chat_template = _template(chat_template)
        self.template_options = dict(template_options or {})
        self.loss_on: LossOn = loss_on

    @override
    def _encoder(self, name: str) -> ChatEncoder:
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, ChatTokenizer) or not (self.chat_template or tokenizer.chat_template):
            raise ValueError(
                f"ChatDataModule(tokenizer={self._tokenizer_source!r}) has no chat template, by which messages become"
                " text. Use the folder or the hub name of a chat model, or give a tokenizer of transformers and a"
                " chat_template."
            )
        return ChatEncoder(
            tokenizer,
            messages_column=self.text_column,
            prompt_column=self.prompt_column,
            loss_on=self.loss_on,
            chat_template=self.chat_template,
            template_options=self.template_options,
            max_length=self.seq_length,
        )

    @override
    def _check(self, name: str, rows: Any) -> Mapping[str, Any]:
        first = super()._check(name, rows)
        if self.loss_on != "all":
            self._warn_without_ends(self._encoder(name), first)
        return first

    @override
    def _leaves_labels(self, row: Mapping[str, Any]) -> bool:
        return False  # the labels follow from the messages

    @property
    @override
    def _collator(self) -> Collator:
        return (CollateWholeTexts if self.packing else PaddingCollator)(self.tokenizer.eod_id)

    @override
    def _pack(self, documents: Dataset) -> WholeTexts:
        return WholeTexts(documents, self.seq_length)

    @override
    def _pack_stream(self, documents: DocumentStream) -> WholeTextStream:
        return WholeTextStream(documents, self.seq_length)

    def _warn_without_ends(self, encoder: ChatEncoder, row: Mapping[str, Any]) -> None:
        """Warn where an answer ends without a token by which generation stops, for then it is not learnt."""
        ids, learnt = encoder.encode(row)
        for id_ in [id_ for id_, on in zip(ids, learnt, strict=True) if on][::-1]:
            text = self.tokenizer.decode([id_])  # which leaves special tokens out
            if not text or id_ == self.tokenizer.eod_id:
                return
            if text.strip():
                warnings.warn(
                    f"ChatDataModule: the last token that is learnt of an answer is {text!r}, and no special token"
                    " follows it, so the model does not learn to stop. Put the end-of-turn token between"
                    " {% generation %} and {% endgeneration %} in the chat template.",
                    stacklevel=2,
                )
                return


def _template(given: str | Path | None) -> str | None:
    """The text of a template, of which a path may be given."""
    if given is None or (isinstance(given, str) and "{" in given):
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(
            f"ChatDataModule(chat_template={str(given)!r}) is neither a template in Jinja nor the path of a file with"
            f" one (seen from {Path.cwd()})."
        )
    return path.read_text(encoding="utf-8")
