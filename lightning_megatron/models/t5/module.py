"""``T5Module``: sequence-to-sequence training of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron.distributed import process_groups, shared_weights
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.collectives import gather_vocabulary
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models import row_documents
from lightning_megatron.models.batch_checks import check_alike, check_range, check_tokens, given
from lightning_megatron.models.generation import GenerationSettings, Prompts, Stages
from lightning_megatron.models.generation.module import GeneratingModule
from lightning_megatron.models.host_answers import Question, answers, with_answers
from lightning_megatron.models.layers.attention import pad_mask
from lightning_megatron.models.layers.chunked_cross_entropy import WeightedLabels
from lightning_megatron.models.layers.output_layer import OutputLayer, cross_entropy_over_shards
from lightning_megatron.models.lora import LoRA
from lightning_megatron.models.megatron_module import IGNORED_LABEL, Batch, Loss, LossReduction, SchedulerCallable
from lightning_megatron.models.recompute import Recompute
from lightning_megatron.models.t5 import pair_masks, pipeline_split
from lightning_megatron.models.t5.config import T5Config
from lightning_megatron.models.t5.decoder import T5Decoder
from lightning_megatron.models.t5.model import T5Model
from lightning_megatron.models.t5.pair_masks import Documents
from lightning_megatron.models.weight_init import FirstWeights
from lightning_megatron.training.lr_schedule import LRSchedule
from lightning_megatron.training.parameter_groups import OptimizerCallable, ParameterGroups

# Megatron's names of what transformers calls otherwise.
_NAMES = {"text_enc": "input_ids", "text_dec": "decoder_input_ids"}
_POSITIONS = ("position_ids", "decoder_position_ids")


@answer_wrong_names
class T5Module(GeneratingModule):
    """A T5, trained to give the labels.

    Batches are mappings of tensors, batch first, as transformers' collators make them: ``input_ids`` ``[b, se]``,
    ``labels`` ``[b, sd]`` (−100 is ignored), optional ``attention_mask``, ``decoder_input_ids`` (without them the
    labels, shifted) and ``decoder_attention_mask``. Or as Megatron's datasets make them: ``text_enc``, ``text_dec``,
    ``labels``, ``loss_mask``, and the masks ``enc_mask``, ``dec_mask`` and ``enc_dec_mask``, 1 where a query may look.

    Pairs of texts that share a row are kept apart by ``seq_idx`` ``[b, se]`` and ``decoder_seq_idx`` ``[b, sd]`` (the
    number of each token's text), or ``cu_seqlens`` and ``decoder_cu_seqlens`` (also ``cu_seq_lens_q`` and the like), or
    ``position_ids`` and ``decoder_position_ids`` that begin anew. The decoder's n-th text looks at the encoder's n-th;
    distances and learned positions begin anew in each.

    ``loss`` is given the logits over this rank's shard of the vocabulary.

    Args:
        config: The shape of the model.
        optimizer: Makes the torch optimizer from the parameters, or ``ParameterGroups``; AdamW by default.
        lr_schedule: ``LRSchedule``, or makes a scheduler from that optimizer; see ``MegatronModule``.
        loss_reduction: "token" or "micro_batch", see ``MegatronModule``.
        lora: Low-rank updates that are trained in place of the weights. None: all weights are trained.
        label_smoothing: Share of each label that training spreads evenly over all token ids, see ``LossTerms``.
        z_loss: Weight of ``(log Z)²`` in the training loss, see ``LossTerms``. Neither changes ``val_loss``.
    """

    config: T5Config
    config_type = T5Config

    def __init__(
        self,
        config: T5Config,
        optimizer: ParameterGroups | OptimizerCallable | None = None,
        lr_schedule: LRSchedule | SchedulerCallable | None = None,
        loss_reduction: LossReduction = "token",
        lora: LoRA | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(config, optimizer, lr_schedule, loss_reduction, lora, label_smoothing, z_loss)

    def complete_layout(self, layout: ParallelLayout, recompute: Recompute | None = None) -> ParallelLayout:
        """The layout with a split between encoder and decoder, and the layers of each stage.

        Raises:
            LayoutError: A stage would have no layer.
        """
        return self.config.complete_layout(layout, recompute)

    def configure_model(self) -> None:
        """Build this rank's chunks, once; stages of a stack start with the same position bias."""
        built = len(self.chunks) > 0
        super().configure_model()
        if not built:
            shared_weights.broadcast_initial_values(self.chunks)

    def build_model(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
        """One chunk: layers of the encoder, or of the decoder, or the whole model where there are no stages."""
        config, settings = self.config, self.build_settings
        number = (vp_stage or 0) * settings.layout.pp + self._pipeline_stage
        encoder, decoder = config.encoder_config(settings), config.decoder_config(settings)
        first_weights = FirstWeights(decoder, encoder)
        model = T5Model(
            encoder,
            decoder,
            stage=pipeline_split.stage(settings.layout, number),
            padded_vocab_size=settings.layout.padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by),
            tie_embeddings=config.tie_embeddings,
            positions=config.position_embedding,
            max_length=config.longest,
            buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            fused_layers=self.build_settings.kernels.fused_layers is True,
        )
        if post_process:
            OutputLayer.become(model.output_layer, config.vocab_size, settings.kernels, self.loss_terms)
        first_weights.draw(model, process_groups.run_seed(), config.vocab_size)
        model.start_queries_small()
        return model

    def _check_loaded(self, batch: Batch) -> None:
        """Refuse a batch without tokens or targets, with ids out of range, too long, or with masks of another shape."""
        batch = _renamed(batch)
        self._check_inputs(batch)
        target = _target(batch)
        check_alike("T5Module", batch, "attention_mask", "input_ids")
        check_alike("T5Module", batch, "decoder_attention_mask", target)
        pair_masks.check(batch, target)

    def _check_inputs(self, inputs: Batch) -> None:
        """Refuse tokens and labels out of range, or longer than the configuration says."""
        batch, config = _renamed(inputs), self.config
        if "labels" not in batch and not (self._predicts and "decoder_input_ids" in batch):
            raise ValueError(
                f"T5Module needs 'labels' [b, sd] (to predict, 'decoder_input_ids' do); this batch has {sorted(batch)}."
                " Add them in the collate function."
            )
        lengths, sides = {"input_ids": config.seq_length}, {"input_ids": pair_masks.encoder_side(batch)}
        sides["decoder_input_ids"] = sides["labels"] = pair_masks.decoder_side(batch)
        lengths["decoder_input_ids"] = lengths["labels"] = config.decoder_seq_length or config.seq_length
        for name, longest in lengths.items():
            if name not in batch:
                continue
            ids = batch[name]
            check_tokens("T5Module", name, ids)
            self._check_length(name, row_documents.longest(sides[name], ids.size(1)), longest)
            ids = ids[ids != IGNORED_LABEL] if name == "labels" else ids
            check_range("T5Module", name, ids, config.vocab_size, "T5Config.vocab_size")
        target = _target(batch)
        if "decoder_input_ids" in batch:
            check_alike("T5Module", batch, target, "decoder_input_ids")

    def _check_length(self, name: str, tokens: int, longest: int) -> None:
        if tokens > longest:
            side = "seq_length" if name == "input_ids" else "decoder_seq_length"
            raise ValueError(
                f"T5Module: {name!r} has {tokens} tokens, but T5Config({side}={longest}). Cut the samples, or use"
                f" {side}={tokens} or more."
            )

    def _loaded_lengths(self, batch: Batch) -> tuple[int, ...]:
        batch = _renamed(batch)
        return int(batch["input_ids"].size(1)), int(batch[_target(batch)].size(1))

    def _input_lengths(self, inputs: Batch) -> tuple[int, ...]:
        return int(inputs["input_ids"].size(1)), int(inputs["decoder_input_ids"].size(1))

    def get_batch(self, batch: Batch) -> Batch:
        """Tokens of both sides, who looks at whom, learned positions that begin anew, and labels, from either form."""
        batch = _renamed(with_answers(given(batch)))
        tokens, target = batch["input_ids"].long(), _target(batch)
        documents = pair_masks.documents_of(batch, tokens.shape, batch[target].shape)
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "decoder_input_ids": self._decoder_inputs(batch, None if documents is None else documents[1]),
            **pair_masks.masks(batch, documents, batch[target].size(1)),
            **self._positions(batch, documents),
        }
        if "labels" in batch:
            inputs["labels"] = batch["labels"].long()
            if self._counts_labels:
                inputs["num_labels"] = sum(answers(batch, _number_of_labels))
        return inputs

    _get_batch_of_family = get_batch

    @property
    def _counts_labels(self) -> bool:
        """Whether the loss is given the number of labels, which no method of the user's may have changed."""
        return not self.has_own_get_batch and type(self).loss is T5Module.loss

    def _questions(self, batch: Batch) -> Iterator[Question]:
        yield from pair_masks.questions(batch)
        if self._counts_labels and "labels" in batch:
            yield _number_of_labels

    def pad_inputs(self, inputs: Batch, multiple: int) -> Batch:
        """Pad behind each side's text; no token looks at the padding, and it has no label."""
        tokens, targets = inputs["input_ids"], inputs["decoder_input_ids"]
        more, more_targets = (-ids.size(1) % multiple for ids in (tokens, targets))
        unmasked = torch.zeros(len(tokens), 1, 1, tokens.size(1), dtype=torch.bool, device=tokens.device)
        masks = {name: inputs[name] for name in ("encoder_mask", "cross_mask")}
        if more:  # None says that nothing is padded
            masks = {name: unmasked if mask is None else mask for name, mask in masks.items()}
        padded: dict[str, Any] = {
            "input_ids": F.pad(tokens, (0, more)),
            "decoder_input_ids": F.pad(targets, (0, more_targets)),
            "encoder_mask": pad_mask(masks["encoder_mask"], more, more),
            "decoder_mask": pad_mask(inputs["decoder_mask"], more_targets, more_targets),
            "cross_mask": pad_mask(masks["cross_mask"], more_targets, more),
        }
        if "labels" in inputs:
            padded["labels"] = F.pad(inputs["labels"], (0, more_targets), value=IGNORED_LABEL)
        for name, count in (("position_ids", more), ("decoder_position_ids", more_targets)):
            if inputs.get(name) is not None:
                padded[name] = F.pad(inputs[name], (0, count))
        return {**inputs, **padded}

    def shard_inputs(self, inputs: Batch) -> Batch:
        """This rank's tokens and labels of both sides, the decoder's zig-zag; the masks stay those of whole rows."""
        sides = {True: ("decoder_input_ids", "labels", "decoder_position_ids"), False: ("input_ids", "position_ids")}
        sharded: Batch = {
            name: SequenceShards.here(zigzag=zigzag).take(inputs[name], 1)
            for zigzag, names in sides.items()
            for name in names
            if inputs.get(name) is not None
        }
        unknown = {"num_labels": None} if "num_labels" in inputs else {}  # of this rank's labels, on the host
        return {**inputs, **sharded, **unknown}  # type: ignore[dict-item]

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Sum and count over the labels that are not ignored.

        Args:
            output: The logits ``[b, sd, vocab/tp]``; or that sum, where no subclass replaces this method and
                ``Kernels(chunked_loss=True)`` computes the loss without them.
            batch: The inputs of the model.
        """
        number: Any = batch.get("num_labels")
        return cross_entropy_over_shards(output, batch["labels"], IGNORED_LABEL, number)

    _loss_of_family = loss

    def _weighted_labels(self, inputs: Batch) -> WeightedLabels:
        number: Any = inputs.get("num_labels")
        return WeightedLabels.without(inputs["labels"], IGNORED_LABEL, number)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        """Hidden states, or on the last stage the logits ``[b, sd, vocab]`` over the whole vocabulary."""
        inputs = self._get_batch_to_predict(batch)
        length = inputs["decoder_input_ids"].size(1)
        output: torch.Tensor = self.active_model(**self._fitted(inputs))
        if not self.on_last_stage:
            return output
        logits = gather_vocabulary(output)[..., : self.config.vocab_size]
        return SequenceShards.here(zigzag=True).gather(logits, 1)[:, :length]

    @property
    def _encodes(self) -> bool:
        return True

    def _check_prompts(self, prompts: Prompts, new: int) -> None:
        config = self.config
        sides = {"seq_length": prompts.longest, "decoder_seq_length": new}
        longest = {
            "seq_length": config.seq_length,
            "decoder_seq_length": config.decoder_seq_length or config.seq_length,
        }
        for side, tokens in sides.items():
            if config.position_embedding == "learned" and tokens > longest[side]:
                remedy = "Cut the prompts." if side == "seq_length" else "Use a smaller max_new_tokens."
                raise ValueError(
                    f"T5Module.generate: {tokens} tokens are more than the positions of"
                    f" T5Config({side}={longest[side]}). {remedy}"
                )

    def _decoder(self, stages: Stages, prompts: Prompts, settings: GenerationSettings) -> T5Decoder:
        first = settings.given.get("decoder_start_token_id", self.config.decoder_start_id)
        start = Prompts.same(first, len(prompts.ids)).to(prompts.ids.device)
        split = self.build_settings.layout.pipeline_split_rank or 0
        vocab, new, beams = self.config.vocab_size, settings.max_new_tokens, settings.copies
        return T5Decoder(stages, prompts, start, vocab, new, beams, split)

    def _decoder_inputs(self, batch: Batch, documents: torch.Tensor | None) -> torch.Tensor:
        """The decoder's inputs: those of the batch, or in each document the start token and all labels but the last."""
        if "decoder_input_ids" in batch:
            return batch["decoder_input_ids"].long()
        start = self.config.decoder_start_id
        shifted = F.pad(batch["labels"][:, :-1].long(), (1, 0), value=start)
        starts = shifted == IGNORED_LABEL
        if documents is not None:
            starts = starts | F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
        return shifted.masked_fill(starts, start)

    def _positions(self, batch: Batch, documents: Documents | None) -> Batch:
        """Learned positions of both sides, where they are not the places in the row."""
        if self.config.position_embedding != "learned":
            return {}
        found = {} if documents is None else dict(zip(_POSITIONS, map(row_documents.places, documents), strict=True))
        for name, tokens in zip(_POSITIONS, (batch["input_ids"], batch[_target(batch)]), strict=True):
            if name in batch:
                found[name] = batch[name].long().expand(tokens.shape)
        return found


def _target(batch: Batch) -> str:
    """Key of a batch that has as many tokens as the decoder."""
    return "labels" if "labels" in batch else "decoder_input_ids"


def _renamed(batch: Batch) -> Batch:
    """The batch under transformers' names; labels that Megatron's loss mask leaves out are −100."""
    found = {_NAMES.get(name, name): value for name, value in batch.items()}
    if "input_ids" not in found:
        raise ValueError(
            f"T5Module needs 'input_ids' [b, s], or Megatron's 'text_enc' [b, s]; this batch has {sorted(batch)}."
            " Rename the key in the collate function, or override get_batch."
        )
    mask = found.pop("loss_mask", None)
    if mask is not None and "labels" in found:
        found["labels"] = found["labels"].masked_fill(mask == 0, IGNORED_LABEL)
    return found


def _number_of_labels(batch: Batch) -> torch.Tensor:
    """``[b]``, how many labels of each row are not ignored."""
    return (_renamed(batch)["labels"] != IGNORED_LABEL).sum(dim=1)
