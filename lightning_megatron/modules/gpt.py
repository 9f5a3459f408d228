"""``GPTModule``: causal language modelling."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from lightning_megatron.generation import GenerationSettings, GPTDecoder, Prompts, Stages
from lightning_megatron.groups import gather_vocabulary
from lightning_megatron.layers import gpt_block_spec, mask_padded_vocabulary, scale_output, stretch_rotary
from lightning_megatron.lora import LoRA
from lightning_megatron.modules.base import (
    IGNORED_LABEL,
    Batch,
    Loss,
    LossReduction,
    SchedulerCallable,
)
from lightning_megatron.modules.batch_checks import check_tokens
from lightning_megatron.modules.documents import Documents
from lightning_megatron.modules.generating import GeneratingModule
from lightning_megatron.modules.gpt_config import GPTConfig
from lightning_megatron.parameter_groups import OptimizerCallable, ParameterGroups
from lightning_megatron.schedule import LRSchedule


class GPTModule(GeneratingModule):
    """A GPT, trained to predict the next token.

    Batches are dicts of tensors, batch first, in one of two forms: transformers' ``input_ids`` ``[b, s]`` with optional
    ``labels`` (−100 is ignored, the shift is made here; without them the inputs are the labels), ``attention_mask``,
    ``position_ids`` and ``loss_mask``; or Megatron's ``text`` ``[b, s+1]``, or ``tokens``, ``labels``, ``loss_mask``
    ``position_ids`` and ``attention_mask`` (``[b, 1, s, s]``, True where a query may not look), shifted already.

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
    """

    config: GPTConfig
    config_type = GPTConfig

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
    ) -> None:
        super().__init__(config, optimizer, lr_schedule, loss_reduction, lora)
        self.documents = Documents(eod_id, reset_position_ids, reset_attention_mask, eod_mask_loss)
        self.save_hyperparameters(*vars(self.documents), logger=False)

    def build_model(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
        """One chunk of megatron-core's ``GPTModel``."""
        config, settings = self.config, self.build_settings
        core = config.transformer_config(settings)
        model = GPTModel(
            config=core,
            transformer_layer_spec=gpt_block_spec(core, config.layers, config.parallel_residual, vp_stage),
            vocab_size=settings.layout.padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by),
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=config.tie_embeddings,
            position_embedding_type=config.megatron_position_embedding,
            rotary_base=config.rotary_base,
            rotary_percent=config.rotary_percent,
            vp_stage=vp_stage,
        )
        if config.rope_scaling is not None:
            stretch_rotary(model, config.rotary_base, config.rotary_percent, config.seq_length, config.rope_scaling)
        if pre_process and config.embedding_multiplier != 1.0:
            scale_output(model.embedding, config.embedding_multiplier)
        if post_process:
            mask_padded_vocabulary(model.output_layer, config.vocab_size)
        return model

    def check_batch(self, batch: Batch) -> None:
        """Refuse a batch without tokens, with ids beyond the vocabulary, or longer than the positions.

        Raises:
            ValueError: With the values seen.
        """
        batch = self.readable(batch)
        name = _token_key(batch)
        tokens = batch[name]
        check_tokens("GPTModule", name, tokens)
        length = tokens.size(1) - (name == "text")
        if length > self.config.seq_length:
            raise ValueError(
                f"GPTModule: sequences of {length} tokens, but GPTConfig(seq_length={self.config.seq_length})."
                f" Cut the samples, or use seq_length={length} or more."
            )
        self._check_ids(name, tokens)
        if "labels" in batch:
            labels = batch["labels"]
            self._check_ids("labels", labels[labels != IGNORED_LABEL])

    def sequence_length(self, batch: Batch) -> int:
        """Tokens per sequence, rounded up as ``get_batch`` pads."""
        batch = self.readable(batch)
        name = _token_key(batch)
        length = int(batch[name].size(1)) - (name == "text")
        return length + self._padding(length)

    def get_batch(self, batch: Batch) -> Batch:
        """Tokens, labels, loss mask and positions ``[b, s]`` from either form of batch."""
        inputs = _from_megatron(batch) if _token_key(batch) != "input_ids" else _from_transformers(batch)
        tokens = inputs["input_ids"]
        inputs["position_ids"] = self.documents.positions(tokens, inputs["position_ids"])
        inputs["loss_mask"] = self.documents.kept(tokens, inputs["loss_mask"])
        unseen = [mask for mask in (inputs.pop("unseen", None), self.documents.apart(tokens)) if mask is not None]
        padding = self._padding(tokens.size(1))
        if padding:  # behind the text, and masked: a causal model never sees it
            for name in ("input_ids", "position_ids", "labels", "loss_mask"):
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, padding))
        inputs["attention_mask"] = _causal_mask(unseen, padding)  # type: ignore[assignment]
        return inputs

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Sum and count over the tokens that the loss mask keeps; ``output`` is the loss of each, ``[b, s]``."""
        mask = batch["loss_mask"]
        return (output.float() * mask).sum(), mask.sum()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Hidden states, or on the last stage the logits ``[b, s, vocab]`` over the whole vocabulary."""
        inputs = self.get_batch(batch)
        batch = self.readable(batch)
        length = batch[_token_key(batch)].size(1)
        inputs["labels"] = None  # type: ignore[assignment]
        output = self.active_model(**inputs)
        if not self.on_last_stage:
            return output
        return gather_vocabulary(output)[:, :length, : self.config.vocab_size]

    def _check_prompts(self, prompts: Prompts, new: int) -> None:
        config = self.config
        if config.position_embedding == "learned" and prompts.longest + new > config.seq_length:
            raise ValueError(
                f"GPTModule.generate: a prompt of {prompts.longest} tokens and max_new_tokens={new} are more than the"
                f" {config.seq_length} positions of GPTConfig(seq_length={config.seq_length}). Use max_new_tokens="
                f"{max(config.seq_length - prompts.longest, 0)} or less, or cut the prompts."
            )
        if config.layers != "torch" and not prompts.keep.all():
            raise ValueError(
                f"GPTModule.generate: with GPTConfig(layers={config.layers!r}) prompts are not padded; write on prompts"
                " of one length at a time, or use layers='torch'."
            )

    def _decoder(self, stages: Stages, prompts: Prompts, settings: GenerationSettings) -> GPTDecoder:
        return GPTDecoder(stages, prompts, self.config.vocab_size, settings.max_new_tokens, settings.num_beams)

    def _check_ids(self, name: str, ids: torch.Tensor) -> None:
        vocab_size = self.config.vocab_size
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if wrong.numel():
            raise ValueError(
                f"GPTModule: token id {int(wrong.max())} in {name!r} is outside of the vocabulary of"
                f" GPTConfig(vocab_size={vocab_size}), ids 0 to {vocab_size - 1}. Use the tokenizer's own vocab_size."
                f" Labels may be {IGNORED_LABEL}, too, which takes no part in the loss."
            )


def _token_key(batch: Batch) -> str:
    for name in ("input_ids", "tokens", "text"):
        if name in batch:
            return name
    raise ValueError(
        f"GPTModule needs 'input_ids' [b, s], or Megatron's 'tokens' and 'labels' [b, s] or 'text' [b, s+1]; this batch"
        f" has {sorted(batch)}. Rename the key in the collate function, or override get_batch."
    )


def _from_megatron(batch: Batch) -> Batch:
    if "text" in batch:
        text = batch["text"].long()
        tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    else:
        tokens, labels = batch["tokens"].long(), batch["labels"].long()
    mask = (labels != IGNORED_LABEL).float()
    if "loss_mask" in batch:
        mask = mask * batch["loss_mask"].float()
    inputs = {
        "input_ids": tokens,
        "labels": labels.clamp(min=0),
        "loss_mask": mask,
        "position_ids": batch.get("position_ids", _positions(tokens)),
    }
    if "attention_mask" in batch:
        inputs["unseen"] = batch["attention_mask"].bool()
    return inputs


def _from_transformers(batch: Batch) -> Batch:
    tokens = batch["input_ids"].long()
    attention = batch.get("attention_mask")
    labels = batch.get("labels")
    if labels is None:
        labels = tokens if attention is None else tokens.masked_fill(attention == 0, IGNORED_LABEL)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    mask = (shifted != IGNORED_LABEL).float()
    if "loss_mask" in batch:  # aligned with the labels, so it shifts with them
        mask = mask * torch.nn.functional.pad(batch["loss_mask"][:, 1:].float(), (0, 1))
    inputs = {
        "input_ids": tokens,
        "labels": shifted.clamp(min=0),
        "loss_mask": mask,
        "position_ids": batch.get("position_ids", _positions(tokens)),
    }
    if attention is not None and not bool(attention.all()):
        inputs["unseen"] = ~attention.bool()[:, None, None, :]
    return inputs


def _positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)


def _causal_mask(unseen: list[torch.Tensor], padding: int) -> torch.Tensor | None:
    """``[b, 1, s, s]``, True where a query may not look: ahead and at what is ``unseen``, but always at itself.

    None where nothing but what lies ahead is unseen, which attention has a faster way for.
    """
    if not unseen:
        return None
    blocked = functools.reduce(torch.logical_or, unseen)
    length = blocked.size(-1) + padding
    blocked = torch.nn.functional.pad(blocked, (0, padding, 0, padding if blocked.size(-2) > 1 else 0))
    ahead = torch.ones(length, length, dtype=torch.bool, device=blocked.device).triu(1)
    itself = torch.eye(length, dtype=torch.bool, device=blocked.device)
    return (ahead | blocked) & ~itself
