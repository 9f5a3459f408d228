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
from lightning_megatron.models.t5 import pipeline_split
from lightning_megatron.models.t5.config import T5Config
from lightning_megatron.models.t5.decoder import T5Decoder
from lightning_megatron.models.t5.model import T5Model
from lightning_megatron.models.weight_init import FirstWeights
from lightning_megatron.training.lr_schedule import LRSchedule
from lightning_megatron.training.parameter_groups import OptimizerCallable, ParameterGroups

# Megatron's names of what transformers calls otherwise.
_NAMES = {"text_enc": "input_ids", "text_dec": "decoder_input_ids"}

# Megatron's masks, 1 where a query may look: rows, queries, keys.
_MEGATRON_MASKS = {
    "enc_mask": ("b", "se", "se"),
    "dec_mask": ("b", "sd", "sd"),
    "enc_dec_mask": ("b", "sd", "se"),
}


@answer_wrong_names
class T5Module(GeneratingModule):
    """A T5, trained to give the labels.

    Batches are mappings of tensors, batch first, as transformers' collators make them: ``input_ids`` ``[b, se]``,
    ``labels`` ``[b, sd]`` (−100 is ignored), optional ``attention_mask``, ``decoder_input_ids`` (without them the
    labels, shifted) and ``decoder_attention_mask``. Or as Megatron's datasets make them: ``text_enc``, ``text_dec``,
    ``labels``, ``loss_mask``, and the masks ``enc_mask``, ``dec_mask`` and ``enc_dec_mask``, 1 where a query may look.

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

    def _unmet_keys(self) -> dict[str, str]:
        return dict.fromkeys(
            (*row_documents.KEYS,), "texts that share a row would see one another in a T5; give each a row of its own"
        )

    def _check_loaded(self, batch: Batch) -> None:
        """Refuse a batch without tokens or targets, with ids out of range, too long, or with masks of another shape."""
        batch = _renamed(batch)
        self._check_inputs(batch)
        target = "labels" if "labels" in batch else "decoder_input_ids"
        check_alike("T5Module", batch, "attention_mask", "input_ids")
        check_alike("T5Module", batch, "decoder_attention_mask", target)
        rows, encoder, decoder = *batch["input_ids"].shape, batch[target].size(1)
        for key, shape in _MEGATRON_MASKS.items():
            sizes = {"b": rows, "se": encoder, "sd": decoder}
            wanted = tuple(sizes[letter] for letter in shape)
            if key in batch and tuple(batch[key].shape) != wanted:
                raise ValueError(
                    f"T5Module: {key!r} is {tuple(batch[key].shape)}, and this batch's tokens ask for {wanted}"
                    f" ([{', '.join(shape)}]). Correct the mask in the collate function."
                )

    def _check_inputs(self, inputs: Batch) -> None:
        """Refuse tokens and labels out of range, or longer than the configuration says."""
        batch, config = _renamed(inputs), self.config
        if "labels" not in batch and not (self._predicts and "decoder_input_ids" in batch):
            raise ValueError(
                f"T5Module needs 'labels' [b, sd] (to predict, 'decoder_input_ids' do); this batch has {sorted(batch)}."
                " Add them in the collate function."
            )
        lengths = {"input_ids": config.seq_length}
        lengths["decoder_input_ids"] = lengths["labels"] = config.decoder_seq_length or config.seq_length
        for name, longest in lengths.items():
            if name not in batch:
                continue
            ids = batch[name]
            check_tokens("T5Module", name, ids)
            if ids.size(1) > longest:
                side = "seq_length" if name == "input_ids" else "decoder_seq_length"
                raise ValueError(
                    f"T5Module: {name!r} has {ids.size(1)} tokens, but T5Config({side}={longest}). Cut the samples, or"
                    f" use {side}={ids.size(1)} or more."
                )
            ids = ids[ids != IGNORED_LABEL] if name == "labels" else ids
            check_range("T5Module", name, ids, config.vocab_size, "T5Config.vocab_size")
        target = "labels" if "labels" in batch else "decoder_input_ids"
        if "decoder_input_ids" in batch:
            check_alike("T5Module", batch, target, "decoder_input_ids")

    def _loaded_lengths(self, batch: Batch) -> tuple[int, ...]:
        batch = _renamed(batch)
        return int(batch["input_ids"].size(1)), self._decoder_inputs(batch).size(1)

    def _input_lengths(self, inputs: Batch) -> tuple[int, ...]:
        return int(inputs["input_ids"].size(1)), int(inputs["decoder_input_ids"].size(1))

    def get_batch(self, batch: Batch) -> Batch:
        """Tokens of both sides, masks (True where a query may not look), and labels, from either form."""
        batch = _renamed(with_answers(given(batch)))
        tokens, targets = batch["input_ids"].long(), self._decoder_inputs(batch)
        inputs = {
            "input_ids": tokens,
            "decoder_input_ids": targets,
            "encoder_mask": _mask(batch, "enc_mask", _keeps_all_tokens),
            "decoder_mask": _decoder_mask(batch, targets),
            "cross_mask": _mask(batch, "enc_dec_mask", _keeps_all_tokens),
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
        for question, keep in _KEEP.items():
            if keep in batch:
                yield question
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
        return {**inputs, **padded}

    def shard_inputs(self, inputs: Batch) -> Batch:
        """This rank's tokens and labels of both sides, the decoder's zig-zag; the masks stay those of whole rows."""
        decoder = SequenceShards.here(zigzag=True)
        sharded: Batch = {
            name: decoder.take(inputs[name], 1) for name in ("decoder_input_ids", "labels") if name in inputs
        }
        sharded["input_ids"] = SequenceShards.here(zigzag=False).take(inputs["input_ids"], 1)
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

    def _decoder_inputs(self, batch: Batch) -> torch.Tensor:
        """The decoder's inputs: those of the batch, or the start token and the labels without the last one."""
        if "decoder_input_ids" in batch:
            return batch["decoder_input_ids"].long()
        start = self.config.decoder_start_id
        shifted = F.pad(batch["labels"][:, :-1].long(), (1, 0), value=start)
        return shifted.masked_fill(shifted == IGNORED_LABEL, start)


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


def _mask(batch: Batch, key: str, keeps_all: Question) -> Any:
    """Megatron's mask where the batch has one, else one made from the tokens to keep; None where all are kept."""
    if key in batch:
        return ~_looks_somewhere(batch[key] > 0.5)[:, None]
    keep = batch.get(_KEEP[keeps_all])
    if keep is None or all(answers(batch, keeps_all)):
        return None
    return ~_looks_somewhere(keep > 0.5)[:, None, None, :]


def _keeps_all_tokens(batch: Batch) -> torch.Tensor:
    """``[b]``, whether all of the encoder's tokens in each row are looked at."""
    return _looks_somewhere(batch["attention_mask"] > 0.5).all(dim=1)


def _keeps_all_targets(batch: Batch) -> torch.Tensor:
    """``[b]``, whether all of the decoder's tokens in each row are looked at."""
    return _looks_somewhere(batch["decoder_attention_mask"] > 0.5).all(dim=1)


# Each question is about the mask [b, s] of this name.
_KEEP: dict[Question, str] = {_keeps_all_tokens: "attention_mask", _keeps_all_targets: "decoder_attention_mask"}


def _decoder_mask(batch: Batch, targets: torch.Tensor) -> torch.Tensor:
    """As ``_mask``, and no token looks ahead."""
    length = targets.size(1)
    ahead = torch.ones(length, length, dtype=torch.bool, device=targets.device).triu(1)
    itself = torch.eye(length, dtype=torch.bool, device=targets.device)
    mask = _mask(batch, "dec_mask", _keeps_all_targets)
    if mask is None:
        return ahead[None, None]
    mask = ahead | mask
    return mask & ~(mask.all(dim=-1, keepdim=True) & itself)  # a softmax needs one key


def _looks_somewhere(keep: torch.Tensor) -> torch.Tensor:
    """A query that may look at nothing looks at everything: its output is not used, and a softmax needs one key."""
    return keep | ~keep.any(dim=-1, keepdim=True)
