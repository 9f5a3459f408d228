"""``GeneratingModule``: the base of the modules that generate text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from lightning_megatron.distributed import process_groups
from lightning_megatron.hf import Origin
from lightning_megatron.models.configured_module import ConfiguredModule
from lightning_megatron.models.generation import (
    Decoder,
    EarlyStopping,
    GenerationSettings,
    Hooks,
    PrefixAllowedTokens,
    Prompts,
    Stages,
    agree,
    prepared_to_generate,
)


class GeneratingModule(ConfiguredModule):
    """The base of the modules that generate text, ``GPTModule`` and ``T5Module``; arguments as ``ConfiguredModule``."""

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        top_p_decay: float = 1.0,
        top_p_bound: float = 0.0,
        repetition_penalty: float | None = None,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: EarlyStopping | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        stream: Callable[[torch.Tensor], Any] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        **more: Any,
    ) -> Any:
        """Continue texts, token by token, as transformers' ``generate`` does, under every layout.

        An argument that is None has the value of the model's ``generation_config.json`` (tokens that end a text,
        temperature, ...), or transformers' default if that has none. All ranks of a replica call it with the same
        prompts and get the same text; replicas may have different prompts. Where they hold experts together, all of
        them call it equally often, and one whose texts have ended waits for the others. Without a Trainer, call
        ``build`` first to choose a layout; a process that is alone need not. Training continues afterwards as if
        nothing had been generated.

        Args:
            input_ids: Prompts ``[b, s]``; a T5's are the encoder's input.
            attention_mask: ``[b, s]``, 0 where a prompt is padded, on either side; the returned text is padded on the
                left. None: a GPT's prompts are padded where they have ``pad_token_id``, unless that token ends a text;
                a T5's prompts are not padded.
            max_new_tokens: The largest number of tokens to add; 20 by default.
            do_sample: Draw tokens from their probabilities, instead of taking the most probable.
            temperature: The scores are divided by it; values below 1 make probable tokens more probable.
            top_k: Draw from the k most probable tokens, 50 by default; 0 draws from all.
            top_p: Draw from the most probable tokens that together have this probability.
            top_p_decay: Factor on ``top_p`` after each token.
            top_p_bound: ``top_p`` decays no further than this.
            repetition_penalty: Values above 1 make tokens that the text has already less probable.
            num_beams: Number of beams; the most probable text is returned.
            length_penalty: The scores of beams are divided by the length to this power.
            early_stopping: When beam search stops: True at ``num_beams`` finished texts, False when a better one is
                improbable, "never" when there can be no better one.
            eos_token_id: Tokens that end a text; ``[]``: none does.
            pad_token_id: The token that follows a text that has ended. None: the model's, or the first
                ``eos_token_id``.
            seed: Seed of the tokens that are drawn; one seed gives the same text under every layout. None: another
                seed in each call.
            stream: Called on the replica's first rank with each new token of all texts, ``[b]``; not with beams.
            generation_config: transformers' settings; they replace the model's own, and arguments replace them.
            logits_processor: transformers' processors, which change the scores; called on every rank.
            stopping_criteria: transformers' criteria, which end texts; if ranks differ, the first rank decides.
            prefix_allowed_tokens_fn: Returns the tokens that may follow a text.
            streamer: A streamer of transformers', called on the replica's first rank; not with beams.
            tokenizer: The tokenizer of transformers' that ``stop_strings`` needs.
            **more: Further settings of transformers' ``GenerationConfig``: ``max_length``, ``min_new_tokens``,
                ``stop_strings``, ``num_return_sequences``, ``no_repeat_ngram_size``, ``bad_words_ids``, ...

        Returns:
            The prompts and the new tokens, ``[b, s + new]``; a T5 returns the decoder's start token and the new tokens,
            ``[b, 1 + new]``. Several texts of one prompt are consecutive rows. With ``return_dict_in_generate`` it is
            transformers' output object.

        Raises:
            ValueError: An argument is wrong or not supported; raised on all ranks of the replica before any token.
            RuntimeError: It is called within a pipeline's micro-batch, or the model is not built on these ranks; or a
                processor, criterion or streamer has failed, which is raised on all ranks.
        """
        self._prepare_to_generate()
        from lightning_megatron.models.generation.hf_loop import write  # here, since it imports half of transformers

        named = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "num_beams": num_beams,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        given = {name: value for name, value in {**named, **more}.items() if value is not None}
        own = {**(Origin.of(self.hparams).generation or {}), **_said(generation_config)}
        hooks = Hooks(logits_processor, stopping_criteria, prefix_allowed_tokens_fn, tokenizer, stream, streamer)
        decays = {"top_p_decay": top_p_decay, "top_p_bound": top_p_bound}
        prompts, settings, drawn = self._agreed(input_ids, attention_mask, own, given, decays, hooks, seed)
        chunks, device = list(self.chunks), next(self.parameters()).device
        with prepared_to_generate(chunks):
            decoder = self._decoder(Stages(chunks, self._travelling_type, device), prompts.to(device), settings)
            decoder.runs_in_step = self._replicas_share_layers
            return write(decoder, settings, drawn if seed is None else seed, hooks)

    def _agreed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        own: dict[str, Any],
        given: dict[str, Any],
        decays: dict[str, float],
        hooks: Hooks,
        seed: int | None,
    ) -> tuple[Prompts, GenerationSettings, int]:
        """Prompts, settings and a seed that all ranks of the replica share."""
        try:
            if attention_mask is None and not self._encodes:
                attention_mask = _unpadded(input_ids, {**own, **given})
            prompts = Prompts.of(input_ids, attention_mask, self.config.vocab_size)
            start = 1 if self._encodes else prompts.ids.size(1)
            longest = None if self._encodes else self.config.seq_length
            settings = GenerationSettings.of(given, own, start, longest, **decays, encodes=self._encodes)
            settings.check_ids(self.config.vocab_size)
            hooks.check(settings.num_beams, settings.config.stop_strings)
            self._check_prompts(prompts, settings.max_new_tokens)
        except (ValueError, TypeError) as error:
            agree(error, "", self._replicas_share_layers)
            raise
        asked_for = repr((own, given, decays, hooks.description(), seed, prompts.fingerprint()))
        return prompts, settings, agree(None, asked_for, self._replicas_share_layers)

    @property
    def _replicas_share_layers(self) -> bool:
        """Whether a pass needs all replicas, so that they generate together."""
        return False

    @property
    def _encodes(self) -> bool:
        """Whether an encoder reads the prompts, so that the text begins with the decoder's start token."""
        return False

    def _prepare_to_generate(self) -> None:
        """Build a model that is not built yet on this process alone; bring its process groups back.

        Raises:
            RuntimeError: It is in the middle of a pipeline's micro-batch, or belongs to ranks that are gone.
        """
        if self.in_pipeline:
            raise RuntimeError(
                f"{type(self).__name__}.generate needs all pipeline stages at once, and here each is at a micro-batch"
                " of its own. Mark the hook with lightning_megatron.on_all_stages (predict_step), or call generate in"
                " another hook, such as on_validation_epoch_end."
            )
        if not len(self.chunks):
            self.build_alone()
        layout = self.build_settings.layout
        if layout.world_size == 1:
            process_groups.init_default_group(next(self.chunks.parameters()).device)
        if not dist.is_initialized() or dist.get_world_size() != layout.world_size:
            raise RuntimeError(
                f"{type(self).__name__} was built for a run of {layout.world_size} ranks, which has ended. Save a"
                f" checkpoint in the run, and use {type(self).__name__}.load_from_checkpoint."
            )
        process_groups.build(layout)
        for chunk in self.chunks:
            process_groups.rebind(chunk)

    @abstractmethod
    def _check_prompts(self, prompts: Prompts, new: int) -> None:
        """Refuse prompts with which the text would be too long, or that the layers cannot take."""

    @abstractmethod
    def _decoder(self, stages: Stages, prompts: Prompts, settings: GenerationSettings) -> Decoder:
        """Make the family's decoder, which computes the scores of the next token."""

    @property
    def _travelling_type(self) -> torch.dtype:
        """Type of the hidden states that travel between stages."""
        core: Any = self.chunks[0].config
        return torch.float32 if core.fp32_residual_connection else self.build_settings.params_dtype


def _said(config: GenerationConfig | None) -> dict[str, Any]:
    """The settings of transformers' object, as a dictionary."""
    if config is None:
        return {}
    found = {name: value for name, value in vars(config).items() if name[0] != "_" and value is not None}
    return {name: value for name, value in found.items() if name != "transformers_version"}


def _unpadded(input_ids: Any, says: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the mask of padding that transformers derives when it is given none."""
    padding, ends = says.get("pad_token_id"), says.get("eos_token_id")
    if padding is None or padding in (ends if isinstance(ends, list | tuple) else [ends]):
        return None
    try:
        ids = input_ids if isinstance(input_ids, torch.Tensor) else torch.as_tensor(input_ids, device="cpu")
        return ids != padding
    except (ValueError, TypeError, RuntimeError):  # no prompts, which is told behind this
        return None
