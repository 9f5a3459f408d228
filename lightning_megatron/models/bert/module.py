"""``BertModule``: masked language modelling, sentence pairs, classification of sequences and tokens, and answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models import row_documents
from lightning_megatron.models.batch_checks import check_alike, check_range, check_tokens, given
from lightning_megatron.models.bert.config import BertConfig
from lightning_megatron.models.bert.model import MODELS
from lightning_megatron.models.bert.tasks import TASKS
from lightning_megatron.models.configured_module import ConfiguredModule
from lightning_megatron.models.heads.tasks import Task
from lightning_megatron.models.host_answers import Question, answers, with_answers
from lightning_megatron.models.layers.attention import pad_mask
from lightning_megatron.models.layers.attention_pattern import AttentionPattern
from lightning_megatron.models.layers.chunked_cross_entropy import WeightedLabels
from lightning_megatron.models.layers.output_layer import OutputLayer
from lightning_megatron.models.layers.rope_scaling import stretch_rotary
from lightning_megatron.models.layers.window_rotary import give_windows_a_base
from lightning_megatron.models.lora import LoRA
from lightning_megatron.models.megatron_module import IGNORED_LABEL, Batch, Loss, LossReduction, SchedulerCallable
from lightning_megatron.models.weight_init import FirstWeights
from lightning_megatron.training.lr_schedule import LRSchedule
from lightning_megatron.training.parameter_groups import OptimizerCallable, ParameterGroups

# Megatron's names of what transformers calls otherwise; and ALBERT's.
_NAMES = {
    "text": "input_ids",
    "types": "token_type_ids",
    "padding_mask": "attention_mask",
    "is_random": "next_sentence_label",
    "sentence_order_label": "next_sentence_label",
}


@answer_wrong_names
class BertModule(ConfiguredModule):
    """A BERT, trained for ``config.task``.

    Batches are mappings of tensors, batch first, as transformers' collators make them: ``input_ids`` ``[b, s]``,
    optional ``attention_mask`` (1: keep), ``token_type_ids``, ``position_ids``, and ``labels``: ``[b, s]`` for masked
    language modelling and token classification (−100 is ignored), ``[b]`` or ``[b, num_labels]`` for sequence
    classification; "pretraining" also takes ``next_sentence_label`` ``[b]``, and question answering ``start_positions``
    and ``end_positions`` ``[b]`` in place of labels. Or as Megatron's datasets make them:
    ``text``, ``types``, ``labels``, ``loss_mask``, ``padding_mask``, ``is_random``.

    Texts that share a row are kept apart by ``seq_idx`` ``[b, s]`` (the number of each token's text) or ``cu_seqlens``
    (``cu_seq_lens_q``), for tasks with a label to a token; positions begin anew in each.

    ``loss`` is given the logits: those of tokens over this rank's shard of the vocabulary, the others whole. Where no
    subclass replaces it, and ``Kernels(chunked_loss=True)``, the sum of the tokens' losses is in their place. Masked
    language modelling logs ``train_mlm_loss`` and the binary head ``train_sop_loss`` (``val_``, ``test_``) beside their
    sum, ``train_loss``.

    Args:
        config: The shape of the model, and the task.
        optimizer: Makes the torch optimizer from the parameters, or ``ParameterGroups``; AdamW by default.
        lr_schedule: ``LRSchedule``, or makes a scheduler from that optimizer; see ``MegatronModule``.
        loss_reduction: "token" or "micro_batch", see ``MegatronModule``.
        lora: Low-rank updates that are trained in place of the weights. None: all weights are trained.
        label_smoothing: Share of each label that training spreads evenly over all token ids, see ``LossTerms``.
        z_loss: Weight of ``(log Z)²`` in the training loss, see ``LossTerms``. Neither changes ``val_loss``.
    """

    config: BertConfig
    config_type = BertConfig

    def __init__(
        self,
        config: BertConfig,
        optimizer: ParameterGroups | OptimizerCallable | None = None,
        lr_schedule: LRSchedule | SchedulerCallable | None = None,
        loss_reduction: LossReduction = "token",
        lora: LoRA | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(config, optimizer, lr_schedule, loss_reduction, lora, label_smoothing, z_loss)
        self.task: Task = TASKS[config.task](config)

    def build_model(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
        """One chunk of the task's model."""
        config, settings = self.config, self.build_settings
        core = config.transformer_config(settings)
        first_weights = FirstWeights(core)
        model = MODELS[config.task](
            core,
            config,
            padded_vocab_size=settings.layout.padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            fused_layers=self.build_settings.kernels.fused_layers is True,
        )
        if hasattr(model, "output_layer"):
            OutputLayer.become(model.output_layer, config.vocab_size, settings.kernels, self.loss_terms)
        first_weights.draw(model, process_groups.run_seed(), config.vocab_size)
        if config.window_rotary_base is not None:
            give_windows_a_base(model, config.window_rotary_base, 1.0)
        if config.rope_scaling is not None:
            stretch_rotary(model, config.rotary_base, 1.0, config.seq_length, config.rope_scaling)
        return model

    def _check_loaded(self, batch: Batch) -> None:
        """Refuse a batch without tokens, with ids or labels out of range, or longer than the positions."""
        batch = _renamed(batch)
        check_tokens("BertModule", "input_ids", batch["input_ids"])
        row_documents.check("BertModule", batch, *batch["input_ids"].shape)
        self._check_inputs(batch)
        for key in ("attention_mask", "token_type_ids", "position_ids"):
            check_alike("BertModule", batch, key, "input_ids")
        row_documents.check_encoder("BertModule", batch)
        if row_documents.source(batch) is not None and not row_documents.is_one_document(batch).all():
            self.task.check_shared_rows()

    def _check_inputs(self, inputs: Batch) -> None:
        batch, config = _renamed(inputs), self.config
        tokens = batch["input_ids"]
        check_tokens("BertModule", "input_ids", tokens)
        longest = row_documents.longest(batch, tokens.size(1))
        if longest > config.seq_length:
            raise ValueError(
                f"BertModule: sequences of {longest} tokens, but BertConfig(seq_length={config.seq_length})."
                f" Cut the samples, or use seq_length={longest} or more."
            )
        check_range("BertModule", "input_ids", tokens, config.vocab_size, "BertConfig.vocab_size")
        if "token_type_ids" in batch:
            types, known = batch["token_type_ids"], max(config.num_token_types, 1)  # zeros say nothing
            check_range("BertModule", "token_type_ids", types, known, "BertConfig.num_token_types")
        if "position_ids" in batch and config.position_embedding == "learned":
            check_range("BertModule", "position_ids", batch["position_ids"], config.positions, "BertConfig.seq_length")
        if not self._predicts and type(self).loss is BertModule.loss:  # another loss may need no labels
            self.task.check(batch)

    def complete_batch(self, batch: Any) -> Any:
        """Add what only the whole global batch says: how much the binary head's part of the loss weighs."""
        if self.trainer.predicting or self.loss_reduction == "micro_batch" or self.has_own_get_batch:
            return batch
        return self.task.weigh(_renamed(given(batch)))

    def _loaded_lengths(self, batch: Batch) -> tuple[int, ...]:
        return self._input_lengths(_renamed(batch))

    def _input_lengths(self, inputs: Batch) -> tuple[int, ...]:
        return (int(inputs["input_ids"].size(1)),)

    def get_batch(self, batch: Batch) -> Batch:
        """Tokens, types and positions ``[b, s]``, who looks at whom, and the task's labels, from either form."""
        batch = _renamed(with_answers(given(batch)))
        tokens = batch["input_ids"].long()
        documents = None if row_documents.source(batch) is None else row_documents.numbers(batch, tokens.size(1))
        positions = torch.arange(tokens.size(1), device=tokens.device)[None]
        if documents is not None:
            documents = documents.expand_as(tokens)
            positions = row_documents.places(documents)
        if (padding := self.config.position_padding_id) is not None:
            positions = _beyond_padding(tokens, positions, padding)
        if self.config.position_embedding == "learned":
            positions = positions.expand_as(tokens)  # rotary ones are angles, the same for all rows
        inputs = {
            "input_ids": tokens,
            "token_type_ids": batch.get("token_type_ids", torch.zeros_like(tokens)).long(),
            "position_ids": batch.get("position_ids", positions).long(),
        }
        sees_all = "attention_mask" not in batch or all(answers(batch, _sees_all))
        mask = self._mask(tokens.size(1), None if sees_all else _kept(batch), documents)
        inputs |= {"attention_mask": mask, **self.task.labels(batch)}
        if self._counts_labels and "labels" in batch:
            inputs["num_labels"] = sum(answers(batch, _number_of_labels))
        return inputs

    _get_batch_of_family = get_batch

    def _mask(self, length: int, keep: torch.Tensor | None, documents: torch.Tensor | None = None) -> Any:
        """Who looks at whom, as ``BertModel.forward`` takes it; a window needs a pattern, or its masks are of s²."""
        if documents is not None or (keep is not None and self.config.sliding_window is not None):
            return AttentionPattern(length=length, documents=documents, keep=keep, causal=False)
        return None if keep is None else ~keep[:, None, None, :]

    @property
    def _counts_labels(self) -> bool:
        """Whether the loss is given the number of labels, which no method of the user's may have changed."""
        own = self.has_own_get_batch or type(self).loss is not BertModule.loss
        return self.task.asks_number_of_labels and not own

    def _questions(self, batch: Batch) -> Iterator[Question]:
        if "attention_mask" in _renamed(batch):
            yield _sees_all
        if row_documents.source(batch) is not None:
            yield row_documents.is_one_document
        if self._counts_labels and "labels" in batch:
            yield _number_of_labels

    def pad_inputs(self, inputs: Batch, multiple: int) -> Batch:
        """Pad behind the text; no token looks at the padding, and it has no label."""
        tokens = inputs["input_ids"]
        padding = -tokens.size(1) % multiple
        if not padding:
            return inputs
        padded = {name: F.pad(inputs[name], (0, padding)) for name in ("input_ids", "token_type_ids", "position_ids")}
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = self._mask(tokens.size(1), torch.ones_like(tokens, dtype=torch.bool))
        padded["attention_mask"] = pad_mask(mask, padding, padding)  # type: ignore[assignment]
        return {**inputs, **padded, **self.task.pad_labels(inputs, padding)}

    def shard_inputs(self, inputs: Batch) -> Batch:
        """This rank's tokens, types, positions and labels of tokens, one part of each row; the mask stays whole."""
        along = {name: self._shards.take(inputs[name], 1) for name in ("input_ids", "token_type_ids", "position_ids")}
        return {**inputs, **along, **self.task.shard_labels(inputs, self._shards)}

    @property
    def _shards(self) -> SequenceShards:
        return SequenceShards.here(zigzag=False)

    def loss(self, output: Any, batch: Batch) -> Loss:
        """The sum and weight of the task's losses; ``output`` are the logits."""
        parts = self.task.parts(output, batch)
        for name, (total, count) in parts.items():
            if name != "loss":
                self._log_part(name, total, count)
        return self.task.join(parts, batch)

    _loss_of_family = loss

    def _weighted_labels(self, inputs: Batch) -> WeightedLabels:
        number: Any = inputs.get("num_labels")
        return WeightedLabels.without(inputs["labels"], IGNORED_LABEL, number)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Hidden states, or on the last stage the logits, unpadded and over the whole vocabulary."""
        inputs = self._get_batch_to_predict(batch)
        output = self.active_model(**self._fitted(inputs))
        if not self.on_last_stage:
            return output
        return self.task.predictions(output, inputs["input_ids"].size(1), self._shards)

    def _log_part(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        stage, training = self.trainer.state.stage, self.trainer.training
        self.log(
            f"{stage.dataloader_prefix if stage else 'train'}_{name}",
            total.detach() / count.clamp(min=1),
            on_step=training,
            on_epoch=not training,
            batch_size=count.float().clamp(min=1e-6),  # type: ignore[arg-type]
        )


def _beyond_padding(tokens: torch.Tensor, places: torch.Tensor, padding: int) -> torch.Tensor:
    """Positions that count from one beyond the id of padding and leave such tokens out; a text begins at place 0."""
    counted = (tokens != padding).long()
    before = counted.cumsum(dim=1) - counted  # tokens of the row
    first = torch.where(places == 0, before, 0).cummax(dim=1).values  # those before the token's text
    return (before - first + 1) * counted + padding


def _kept(batch: Batch) -> torch.Tensor:
    """The tokens that are looked at; a row of padding only looks everywhere, rather than at nothing."""
    keep = _renamed(batch)["attention_mask"] > 0.5
    return keep | ~keep.any(dim=1, keepdim=True)


def _sees_all(batch: Batch) -> torch.Tensor:
    """``[b]``, whether all tokens of each row are looked at."""
    return _kept(batch).all(dim=1)


def _number_of_labels(batch: Batch) -> torch.Tensor:
    """``[b]``, how many labels of each row are not ignored."""
    return (_renamed(batch)["labels"] != IGNORED_LABEL).sum(dim=1)


def _renamed(batch: Batch) -> Batch:
    """The batch under transformers' names; labels that Megatron's loss mask leaves out are −100."""
    theirs = {_NAMES[name]: value for name, value in batch.items() if name in _NAMES}
    found = {**theirs, **{name: value for name, value in batch.items() if name not in _NAMES}}
    if "input_ids" not in found:
        raise ValueError(
            f"BertModule needs 'input_ids' [b, s], or Megatron's 'text' [b, s]; this batch has {sorted(batch)}. Rename"
            " the key in the collate function, or override get_batch."
        )
    mask = found.pop("loss_mask", None)
    if mask is not None and "labels" in found:
        check_alike("BertModule", {**found, "loss_mask": mask}, "loss_mask", "labels")
        found["labels"] = found["labels"].masked_fill(mask == 0, IGNORED_LABEL)
    return found
