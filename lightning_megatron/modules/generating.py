"""``GeneratingModule``: the adapters that write text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron import groups
from lightning_megatron.generation import (
    Decoder,
    EarlyStopping,
    GenerationSettings,
    Prompts,
    Stages,
    agree,
    lent,
    write,
)
from lightning_megatron.modules.configured import ConfiguredModule


class GeneratingModule(ConfiguredModule):
    """The base of the adapters that have ``generate``; arguments as ``ConfiguredModule``."""

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        top_p_decay: float = 1.0,
        top_p_bound: float = 0.0,
        repetition_penalty: float = 1.0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        stream: Callable[[torch.Tensor], Any] | None = None,
    ) -> torch.Tensor:
        """Write on, token by token, as transformers' ``generate`` does, under every layout.

        All ranks of a replica call it with the same prompts and get the same text; replicas may have different ones.
        Without a Trainer, ``build`` says the layout; a process of its own needs no call. Training goes on afterwards as
        if nothing had been written.

        Args:
            input_ids: Prompts ``[b, s]``; of a T5, the encoder's input.
            attention_mask: ``[b, s]``, 0 where there is padding, on either side; the text has it on the left.
            max_new_tokens: At most so many tokens are added.
            do_sample: Draw tokens from their probabilities, instead of taking the most probable.
            temperature: Divides the scores; below 1 is more cautious.
            top_k: Draw from the k most probable tokens. None: from all.
            top_p: Draw from the most probable tokens that together have this probability.
            top_p_decay: Factor on ``top_p`` after each token.
            top_p_bound: ``top_p`` decays no further than this.
            repetition_penalty: Above 1, tokens that are in the text already are made less probable.
            num_beams: Texts that are followed at once; the most probable is returned.
            length_penalty: Exponent of the length by which beams' scores are divided.
            early_stopping: Of beams: True stops at ``num_beams`` finished texts, False when a better one is improbable,
                "never" when there can be none.
            eos_token_id: Tokens that end a text.
            pad_token_id: Stands behind a text that has ended. None: the first ``eos_token_id``.
            seed: Of the tokens that are drawn; the same seed, the same text, under every layout. None: another each
                time.
            stream: Called on the replica's first rank with each new token of all texts, ``[b]``; not with beams.

        Returns:
            ``[b, s + new]``, prompts and what was added; of a T5 ``[b, 1 + new]``, which begins with the decoder's
            start.

        Raises:
            ValueError: What was asked for cannot be, on all ranks of the replica, before a token is written.
            RuntimeError: Called in a pipeline's micro-batch, or of a model that is not built on these ranks.
        """
        self._prepare_to_generate()
        make_settings = partial(
            GenerationSettings,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            top_p_decay=top_p_decay,
            top_p_bound=top_p_bound,
            repetition_penalty=repetition_penalty,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
        prompts, settings, drawn = self._agreed(input_ids, attention_mask, make_settings, seed, stream is not None)
        chunks, device = list(self.chunks), next(self.parameters()).device
        with lent(chunks):
            decoder = self._decoder(Stages(chunks, self._travelling_type, device), prompts.to(device), settings)
            return write(decoder, settings, drawn if seed is None else seed, stream)

    def _agreed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        make_settings: Callable[[], GenerationSettings],
        seed: int | None,
        streams: bool,
    ) -> tuple[Prompts, GenerationSettings, int]:
        """What all ranks of the replica were asked for, or an error on all of them; and a seed that they share."""
        try:
            settings = make_settings()
            settings.check_ids(self.config.vocab_size)
            if streams and settings.num_beams > 1:
                raise ValueError(
                    f"generate(stream=..., num_beams={settings.num_beams}): beams change their beginnings. Use one."
                )
            prompts = Prompts.of(input_ids, attention_mask, self.config.vocab_size)
            self._check_prompts(prompts, settings.max_new_tokens)
        except (ValueError, TypeError) as error:
            agree(error, "")
            raise
        return prompts, settings, agree(None, repr((settings, seed, streams, prompts.fingerprint())))

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
            groups.join(next(self.chunks.parameters()).device)
        if not dist.is_initialized() or dist.get_world_size() != layout.world_size:
            raise RuntimeError(
                f"{type(self).__name__} was built for a run of {layout.world_size} ranks, which has ended. Save a"
                f" checkpoint in the run, and use {type(self).__name__}.load_from_checkpoint."
            )
        groups.build(layout)
        for chunk in self.chunks:
            groups.rebind(chunk)

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
