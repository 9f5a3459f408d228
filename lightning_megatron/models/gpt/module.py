"""``GPTModule``: causal language modelling, and heads with labels on the same layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.sequence_shards import SequenceShards
from lightning_megatron.models import row_documents
from lightning_megatron.models.batch_checks import check_tokens, given
from lightning_megatron.models.generation import GenerationSettings, Prompts, Stages
from lightning_megatron.models.generation.module import GeneratingModule
from lightning_megatron.models.gpt import attention_masks, batches
from lightning_megatron.models.gpt.config import GPTConfig
from lightning_megatron.models.gpt.decoder import GPTDecoder
from lightning_megatron.models.gpt.headed_model import MODELS, HeadedGPT
from lightning_megatron.models.gpt.layer_spec import gpt_block_spec, last_layer_spec
from lightning_megatron.models.gpt.model import PositionedGPT
from lightning_megatron.models.gpt.multi_token_prediction import LaterTokens, later_tokens
from lightning_megatron.models.gpt.packed_documents import Documents
from lightning_megatron.models.gpt.tasks import TASKS
from lightning_megatron.models.heads.tasks import Task
from lightning_megatron.models.host_answers import Question, answers, with_answers
from lightning_megatron.models.layers.attention import pad_mask
from lightning_megatron.models.layers.chunked_cross_entropy import WeightedLabels
from lightning_megatron.models.layers.fused.rotary import can_rotate
from lightning_megatron.models.layers.output_layer import OutputLayer, add_bias
from lightning_megatron.models.layers.output_norm import norm_outputs
from lightning_megatron.models.layers.output_scale import scale_input, scale_output
from lightning_megatron.models.layers.rope_scaling import stretch_rotary
from lightning_megatron.models.layers.window_rotary import give_windows_a_base
from lightning_megatron.models.lora import LoRA
from lightning_megatron.models.megatron_module import Batch, Loss, LossReduction, SchedulerCallable
from lightning_megatron.models.weight_init import FirstWeights
from lightning_megatron.training.lr_schedule import LRSchedule
from lightning_megatron.training.parameter_groups import OptimizerCallable, ParameterGroups

_ALONG_THE_ROW = ("input_ids", "loss_mask", "position_ids")  # inputs [b, s], beside the labels of tokens


@answer_wrong_names
class GPTModule(GeneratingModule):
    """A GPT, trained to predict the next token, or for another ``config.task``.

    Batches are dicts of tensors, batch first, in one of two forms: transformers' ``input_ids`` ``[b, s]`` with optional
    ``labels`` (−100 is ignored, the shift is made here; without them the inputs are the labels; ``shift_labels`` are
    shifted already), ``attention_mask`` (``[b, s]``, or ``[b, 1, s, s]`` as transformers has it), ``position_ids`` and
    ``loss_mask``; or Megatron's ``text`` ``[b, s+1]``, or ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` and
    ``attention_mask`` (``[b, 1, s, s]``, True where a query may not look), shifted already.

    ``position_ids`` ``[b, s]`` count for learned and for rotary positions. Where they do not go on by one, another
    document begins, and no token looks beyond its own document, as in transformers; an ``attention_mask`` in the batch
    says instead who looks where. ``cu_seqlens`` (``cu_seq_lens_q``) and ``seq_idx`` say where documents begin, too, and
    positions begin anew there. Labels that are made here do not predict a document from the one before it.

    For classification, batches have transformers' form and ``labels``: ``[b]`` or ``[b, num_labels]`` of sequences,
    each of which has a row of its own, and ``[b, s]`` of tokens (−100 is ignored). For question answering they have
    ``start_positions`` and ``end_positions`` ``[b]``. ``loss`` is given the logits.

    Args:
        config: The shape of the model.
        optimizer: Makes the torch optimizer from the parameters, or ``ParameterGroups``; AdamW by default.
        lr_schedule: ``LRSchedule``, or makes a scheduler from that optimizer; see ``MegatronModule``.
        loss_reduction: "token" or "micro_batch", see ``MegatronModule``.
        eod_id: The token that ends a document, for rows that several documents share.
        reset_position_ids: Whether positions start at 0 in each document.
        reset_attention_mask: Whether a token looks only at tokens of its own document.
        eod_mask_loss: Whether the token behind the end of a document is left out of the loss.
        lora: Low-rank updates that are trained in place of the weights. None: all weights are trained.
        label_smoothing: Share of each label that training spreads evenly over all token ids, see ``LossTerms``.
        z_loss: Weight of ``(log Z)²`` in the training loss, see ``LossTerms``. Neither changes ``val_loss``.
    """

    config: GPTConfig
    config_type = GPTConfig
    gives_logits_to_loss = False

    def __init__(
        self,
        config: GPTConfig,
        optimizer: ParameterGroups | OptimizerCallable | None = None,
        lr_schedule: LRSchedule | SchedulerCallable | None = None,
        loss_reduction: LossReduction = "token",
        eod_id: int | None = None,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
        lora: LoRA | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(config, optimizer, lr_schedule, loss_reduction, lora, label_smoothing, z_loss)
        self.task: Task = TASKS[config.task](config)
        self.documents = Documents(eod_id, reset_position_ids, reset_attention_mask, eod_mask_loss)
        self.documents.check_task(config.task)
        if reset_attention_mask and config.layers != "torch":
            raise ValueError(
                f"GPTModule(reset_attention_mask=True): attention of GPTConfig(layers={config.layers!r}) looks at all"
                " earlier tokens. Use layers='torch'."
            )
        self.save_hyperparameters(*vars(self.documents), logger=False)

    def build_model(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
        """One chunk of megatron-core's ``GPTModel``, with the batch's positions."""
        config, settings = self.config, self.build_settings
        core = config.transformer_config(settings)
        first_weights = FirstWeights(core, draws_too=config.layers != "torch")
        fused = settings.kernels.fused_layers is True and config.layers == "torch"
        has_vocabulary = config.outputs_are_sharded
        rotates = fused and config.position_embedding == "rope" and can_rotate(core)
        model = MODELS[config.task](
            config=core,
            transformer_layer_spec=gpt_block_spec(core, config, vp_stage, fused, rotates),
            vocab_size=settings.layout.padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by),
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=config.tie_embeddings and has_vocabulary,
            position_embedding_type=config.megatron_position_embedding,
            rotary_base=config.rotary_base,
            rotary_percent=config.rotary_percent,
            vp_stage=vp_stage,
        )
        model.rotates_by_table = rotates
        if config.mtp:
            model.predict_later_tokens(last_layer_spec(core, config, fused, rotates), config.mtp, config.mtp_weight)
        if config.norm_placement != "pre":
            norm_outputs(model.transformer_layers)
        if post_process and isinstance(model, HeadedGPT):
            model.build_head(config)
        elif post_process and config.output_bias:
            add_bias(model.output_layer)
        first_weights.draw(model, process_groups.run_seed(), config.vocab_size)
        if config.window_rotary_base is not None:
            give_windows_a_base(model, config.window_rotary_base, config.rotary_percent)
        if config.rope_scaling is not None:
            stretch_rotary(model, config.rotary_base, config.rotary_percent, config.seq_length, config.rope_scaling)
        self._scale(model)
        if post_process and has_vocabulary:
            kernels, cap = settings.kernels, config.logits_cap
            OutputLayer.become(model.output_layer, config.vocab_size, kernels, self.loss_terms, cap)
        return model

    def _scale(self, model: PositionedGPT) -> None:
        """Put the configuration's multipliers in their places."""
        config = self.config
        if hasattr(model, "embedding") and config.embedding_multiplier != 1.0:
            scale_output(model.embedding, config.embedding_multiplier)
        if config.residual_multiplier != 1.0:
            for layer in model.transformer_layers:
                scale_output(layer.self_attention, config.residual_multiplier)
                scale_output(layer.mlp, config.residual_multiplier)
        if hasattr(model, "output_layer") and config.logits_divisor != 1.0:
            scale_input(model.output_layer, 1 / config.logits_divisor)

    def _check_loaded(self, batch: Batch) -> None:
        """Refuse a batch without tokens, with ids beyond the vocabulary, or longer than the positions."""
        batches.check_form(self.config, batch)
        name = batches.token_key(batch)
        tokens, batch = batch[name], row_documents.without_token_mask(batch)
        check_tokens("GPTModule", name, tokens)
        rows, length = tokens.size(0), tokens.size(1) - (name == "text")
        if "position_ids" in batch:
            batches.check_positions(self.config, batch, (rows, length))
        row_documents.check("GPTModule", batch, rows, length)
        if "position_ids" not in batch:
            batches.check_length(self.config, row_documents.longest(batch, length))
        if batches.says_documents(batch) and not row_documents.is_one_document(batch).all():
            self.task.check_shared_rows()
        self._check_ids(name, batch)
        attention_masks.check(self.config, batch, name, length)

    def _check_inputs(self, inputs: Batch) -> None:
        name = batches.token_key(inputs)
        check_tokens("GPTModule", name, inputs[name])
        batches.check_length(self.config, inputs[name].size(1))
        self._check_ids(name, inputs)

    def _check_ids(self, name: str, batch: Batch) -> None:
        """Refuse tokens of that name beyond the vocabulary, and labels from which the task cannot learn."""
        batches.check_ids(self.config, name, batch[name])
        if self.config.task == "causal_lm" or not (self._predicts or self.has_own_loss):
            self.task.check(batch)

    def complete_batch(self, batch: Any) -> Any:
        """Add what only the whole global batch says: how much the end of an answer weighs beside its begin."""
        alone = self.trainer.predicting or self.loss_reduction == "micro_batch" or self.has_own_get_batch
        return batch if alone or self.config.task != "question_answering" else self.task.weigh(given(batch))

    def _unmet_keys(self) -> dict[str, str]:
        unmet = {}
        if self.config.position_embedding == "learned":  # GPT-2's; rotary models of transformers ignore them
            unmet["token_type_ids"] = (
                "GPT-2 adds the embedding of the token of that number; use tokenizer(..., return_token_type_ids=False)"
            )
        return unmet

    def _loaded_lengths(self, batch: Batch) -> tuple[int, ...]:
        name = batches.token_key(batch)
        return (int(batch[name].size(1)) - (name == "text"),)

    def _input_lengths(self, inputs: Batch) -> tuple[int, ...]:
        return (int(inputs["input_ids"].size(1)),)

    def get_batch(self, batch: Batch) -> Batch:
        """Tokens, labels, loss mask and positions ``[b, s]`` from either form of batch.

        Rotary positions are None where they are the places in the row.
        """
        batch = row_documents.without_token_mask(with_answers(given(batch)))
        tokens = batches.tokens_of(batch)
        inputs = {"input_ids": tokens, **self.task.labels(batch)}
        numbers = [self.documents.numbers(tokens), self._numbers_of(batch, tokens)]
        found = [each.expand_as(tokens) for each in numbers if each is not None]
        documents = torch.stack(found).sum(dim=0) if found else None  # a document begins where either says so
        if "loss_mask" in inputs:
            inputs["loss_mask"] = self.documents.kept(tokens, inputs["loss_mask"])
        labels_are_made = self.config.task == "causal_lm" and not {"labels", "shift_labels"} & batch.keys()
        if documents is not None and "input_ids" in batch and labels_are_made:
            inputs["loss_mask"] = row_documents.within_documents(inputs["loss_mask"], documents)
        inputs["position_ids"] = self._positions(batch, tokens)
        mask = attention_masks.mask_or_pattern(batch, tokens, documents)
        inputs["attention_mask"] = mask if self.config.layers == "torch" else None  # type: ignore[assignment]
        return inputs

    _get_batch_of_family = get_batch

    def pad_inputs(self, inputs: Batch, multiple: int) -> Batch:
        """Pad behind the text, where a causal model does not look; the loss mask is 0 there."""
        padding = -inputs["input_ids"].size(1) % multiple
        if not padding:
            return inputs
        padded: dict[str, Any] = {**inputs}
        for name in _ALONG_THE_ROW:
            if inputs.get(name) is not None:
                padded[name] = F.pad(inputs[name], (0, padding))
        if inputs.get("later_tokens") is not None:
            padded["later_tokens"] = LaterTokens(*(F.pad(each, (0, padding)) for each in inputs["later_tokens"]))
        padded["attention_mask"] = pad_mask(inputs.get("attention_mask"), padding, padding)
        return {**padded, **self.task.pad_labels(inputs, padding)}

    def shard_inputs(self, inputs: Batch) -> Batch:
        """This rank's tokens, labels and positions ``[b, s/cp]``, zig-zag; the mask stays that of whole rows."""
        shards = SequenceShards.here(zigzag=True)
        along = [name for name in _ALONG_THE_ROW if inputs.get(name) is not None]
        sharded: dict[str, Any] = {name: shards.take(inputs[name], 1) for name in along}
        if inputs.get("later_tokens") is not None:
            sharded["later_tokens"] = LaterTokens(*(shards.take(each, 2) for each in inputs["later_tokens"]))
        return {**inputs, **sharded, **self.task.shard_labels(inputs, shards)}

    def _fitted(self, inputs: Batch) -> Batch:
        """The inputs as this rank takes them; those of experts say how much each token counts in the loss."""
        inputs = self.task.complete(inputs)
        if self.config.mtp and self.training and self.on_last_stage:
            inputs = {**inputs, "later_tokens": later_tokens(inputs, self.config.mtp)}  # type: ignore[dict-item]
        inputs = super()._fitted(inputs)
        if self.config.experts is not None and self.training:
            inputs = {**inputs, "token_weights": self._token_weights(inputs)}
        return inputs

    def _token_weights(self, inputs: Batch) -> torch.Tensor:
        """``[b, s]``, the weight of each token in the loss, by which experts weigh their own losses."""
        mask = inputs.get("loss_mask")
        weights = torch.ones_like(inputs["input_ids"], dtype=torch.float32) if mask is None else mask.float()
        share = self.micro_batch_share
        if self.loss_reduction == "token":
            return weights if share else torch.zeros_like(weights)
        return weights * (share / collectives.sum_over_parts_of_rows(weights.sum()).clamp(min=1))

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """The sum of the losses and what they count.

        Args:
            output: That sum over tokens, or the loss of each token ``[b, s]``; of a head with labels, the logits.
            batch: The padded inputs that ``get_batch`` returned.
        """
        return self.task.join(self.task.parts(output, batch), batch)

    _loss_of_family = loss

    @property
    def _sums_losses(self) -> bool:
        return super()._sums_losses or (self.config.mtp > 0 and self.on_last_stage and not self.has_own_loss)

    def _weighted_labels(self, inputs: Batch) -> WeightedLabels:
        return WeightedLabels(inputs["labels"], inputs["loss_mask"])

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Hidden states, or on the last stage the logits: ``[b, s, vocab]`` over the whole vocabulary, or of labels."""
        inputs = self._get_batch_to_predict(batch)
        length = inputs["input_ids"].size(1)
        without_labels: dict[str, Any] = {**self._fitted(inputs), "labels": None}
        output = self.active_model(**without_labels)
        if not self.on_last_stage:
            return output
        return self.task.predictions(output, length, SequenceShards.here(zigzag=True))

    def _check_prompts(self, prompts: Prompts, new: int) -> None:
        config = self.config
        if config.task != "causal_lm":
            raise ValueError(
                f"GPTModule.generate: with GPTConfig(task={config.task!r}) the model gives scores of labels, and no"
                " tokens. Use trainer.predict, or load it with config={'task': 'causal_lm'}."
            )
        if config.position_embedding == "learned" and prompts.longest + new > config.seq_length:
            raise ValueError(
                f"GPTModule.generate: a prompt of {prompts.longest} tokens and max_new_tokens={new} are more than the"
                f" {config.seq_length} positions of GPTConfig(seq_length={config.seq_length}). Use max_new_tokens="
                f"{max(config.seq_length - prompts.longest, 0)} or less, or cut the prompts."
            )
        if config.layers != "torch" and not prompts.keep.all():
            raise ValueError(
                f"GPTModule.generate: with GPTConfig(layers={config.layers!r}) prompts cannot be padded; give prompts"
                " of one length at a time, or use layers='torch'."
            )
        if config.layers != "torch" and self.build_settings.layout.cp > 1:
            raise ValueError(
                f"GPTModule.generate: the attention of GPTConfig(layers={config.layers!r}) shares out rows under"
                f" cp={self.build_settings.layout.cp}, and generation needs whole ones. Generate with cp=1, or use"
                " layers='torch'."
            )

    @property
    def _replicas_share_layers(self) -> bool:
        return self.config.experts is not None and self.build_settings.layout.replicas_share_experts

    def _decoder(self, stages: Stages, prompts: Prompts, settings: GenerationSettings) -> GPTDecoder:
        return GPTDecoder(stages, prompts, self.config.vocab_size, settings.max_new_tokens, settings.copies)

    def _numbers_of(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor | None:
        """``[b or 1, s]``, the number of each token's document, as the batch has them; None where each row is one."""
        return row_documents.numbers(batch, tokens.size(1)) if batches.says_documents(batch) else None

    def _positions(self, batch: Batch, tokens: torch.Tensor) -> Any:
        """As the documents have them, or the batch; None where rotary positions are the places in the row."""
        chosen, rotary = self._chosen_positions(batch, tokens), self.config.position_embedding != "learned"
        if rotary and (chosen is None or all(answers(batch, self._has_positions_in_order))):
            return None
        return torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens) if chosen is None else chosen

    def _chosen_positions(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor | None:
        """``[b, s]``; None where neither documents nor the batch say that they are not the places in the row."""
        if self.documents.reset_position_ids:
            return self.documents.positions(tokens, self._numbers_of(batch, tokens))
        if "position_ids" in batch:
            return batch["position_ids"].long().expand_as(tokens)
        numbers = self._numbers_of(batch, tokens)
        return None if numbers is None else row_documents.places(numbers.expand_as(tokens))

    def _has_positions_in_order(self, batch: Batch) -> torch.Tensor:
        """``[b]``, whether each row's positions are the places in the row."""
        name = batches.token_key(batch)
        tokens = batch[name][:, :-1] if name == "text" else batch[name]
        index = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        chosen = self._chosen_positions(batch, tokens)
        return ((index if chosen is None else chosen) == index).all(dim=1)

    def _questions(self, batch: Batch) -> Iterator[Question]:
        batch = row_documents.without_token_mask(batch)
        mask, says_documents = batch.get("attention_mask"), batches.says_documents(batch)
        if mask is not None and mask.dim() == 2:
            yield attention_masks.sees_all
        if says_documents:
            yield row_documents.is_one_document
        says_positions = says_documents or "position_ids" in batch or self.documents.reset_position_ids
        if self.config.position_embedding != "learned" and says_positions:
            yield self._has_positions_in_order
