"""``GeneratingModule``: the adapters that write text."""

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
    write,
)


class GeneratingModule(ConfiguredModule):
    """The base of the adapters that have ``generate``; arguments as ``ConfiguredModule``."""

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
        """Write on, token by token, as transformers' ``generate`` does, under every layout.

        What is None is as the model says (its ``generation_config.json``: tokens that end a text, temperature, ...),
        and transformers' default where it says nothing. All ranks of a replica call it with the same prompts and get
        the same text; replicas may have different ones. Without a Trainer, ``build`` says the layout; a process of its
        own needs no call. Training goes on afterwards as if nothing had been written.

        Args:
            input_ids: Prompts ``[b, s]``; of a T5, the encoder's input.
            attention_mask: ``[b, s]``, 0 where there is padding, on either side; the text has it on the left. None: of
                a GPT, where ``pad_token_id`` stands, unless that ends texts; else there is no padding.
            max_new_tokens: At most so many tokens are added; 20 by default.
            do_sample: Draw tokens from their probabilities, instead of taking the most probable.
            temperature: Divides the scores; below 1 is more cautious.
            top_k: Draw from the k most probable tokens, 50 by default; 0: from all.
            top_p: Draw from the most probable tokens that together have this probability.
            top_p_decay: Factor on ``top_p`` after each token.
            top_p_bound: ``top_p`` decays no further than this.
            repetition_penalty: Above 1, tokens that are in the text already are made less probable.
            num_beams: Texts that are followed at once; the most probable is returned.
            length_penalty: Exponent of the length by which beams' scores are divided.
            early_stopping: Of beams: True stops at ``num_beams`` finished texts, False when a better one is improbable,
                "never" when there can be none.
            eos_token_id: Tokens that end a text; ``[]``: none does.
            pad_token_id: Stands behind a text that has ended. None: the model's, or the first ``eos_token_id``.
            seed: Of the tokens that are drawn; the same seed, the same text, under every layout. None: another each
                time.
            stream: Called on the replica's first rank with each new token of all texts, ``[b]``; not with beams.
            generation_config: transformers' object, over what the model says; single arguments go before it.
            logits_processor: A list of them, which change the scores; called on every rank.
            stopping_criteria: A list of them; where ranks differ, the first one's decision holds.
            prefix_allowed_tokens_fn: Tokens that may follow a text.
            streamer: One of transformers', on the replica's first rank; not with beams.
            tokenizer: transformers', which ``stop_strings`` needs.
            **more: Further settings of transformers' ``GenerationConfig``: ``max_length``, ``min_new_tokens``,
                ``stop_strings``, ``num_return_sequences``, ``no_repeat_ngram_size``, ``bad_words_ids``, ...

        Returns:
            ``[b, s + new]``, prompts and what was added; of a T5 ``[b, 1 + new]``, which begins with the decoder's
            start. Several texts of a prompt follow one another. transformers' output object, with
            ``return_dict_in_generate``.

        Raises:
            ValueError: What was asked for cannot be, or is not here, on all ranks of the replica, before a token is
                written.
            RuntimeError: Called in a pipeline's micro-batch, or of a model that is not built on these ranks; or a hook
                of the user's has failed, on all ranks.
        """
        self._prepare_to_generate()
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
        """What all ranks of the replica were asked for, or an error on all of them; and a seed that they share."""
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
            agree(error, "")
            raise
        return prompts, settings, agree(None, repr((own, given, decays, hooks.told(), seed, prompts.fingerprint())))

    @property
    def _encodes(self) -> bool:
        """Whether an encoder reads the prompts, and the text begins anew."""
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
        """What gives the scores."""

    @property
    def _travelling_type(self) -> torch.dtype:
        """Of hidden states between stages."""
        core: Any = self.chunks[0].config
        return torch.float32 if core.fp32_residual_connection else self.build_settings.params_dtype


def _said(config: GenerationConfig | None) -> dict[str, Any]:
    """What an object of transformers' says."""
    if config is None:
        return {}
    found = {name: value for name, value in vars(config).items() if name[0] != "_" and value is not None}
    return {name: value for name, value in found.items() if name != "transformers_version"}


def _unpadded(input_ids: Any, says: Mapping[str, Any]) -> torch.Tensor | None:
    """Where there is no padding, as transformers finds out where nobody says."""
    padding, ends = says.get("pad_token_id"), says.get("eos_token_id")
    if padding is None or padding in (ends if isinstance(ends, list | tuple) else [ends]):
        return None
    try:
        ids = input_ids if isinstance(input_ids, torch.Tensor) else torch.as_tensor(input_ids, device="cpu")
        return ids != padding
    except (ValueError, TypeError, RuntimeError):  # no prompts, which is told behind this
        return None
