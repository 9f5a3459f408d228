"""Runs transformers' generation loop around a ``Decoder``, in the same way on every rank.

Each rank is given the same scores, so each runs the same loop and comes to the same tokens; nobody has to be told what
was chosen. The loop sees a model without a cache that is given whole texts: that interface is public and has not
changed over transformers 5, while those of its caches have.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutput

from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.models.generation.custom_processors import Hooks
from lightning_megatron.models.generation.decoder import Decoder
from lightning_megatron.models.generation.settings import GenerationSettings


def write(decoder: Decoder, settings: GenerationSettings, seed: int, hooks: Hooks) -> Any:
    """Generate texts that continue the decoder's start.

    Args:
        decoder: Computes the scores of the next token.
        settings: Settings that say how tokens are chosen.
        seed: Seed of the tokens that are drawn.
        hooks: The user's functions that run at each token.

    Returns:
        ``[b, start + new]``, the same on every rank; or transformers' output, where the settings ask for it.

    Raises:
        RuntimeError: A user's function has failed; raised on all ranks.
    """
    streamer = None if hooks.stream is None and hooks.streamer is None else _Streamer(hooks.stream, hooks.streamer)
    device = decoder.stages.device
    # transformers' loop makes tensors wherever the device context says; the default one's look at each call costs time.
    here = nullcontext() if torch.get_default_device() == device else device
    with here, torch.random.fork_rng([device] if device.type == "cuda" else []), decoder.in_step():
        torch.manual_seed(seed)
        texts = _Scorer(decoder).generate(
            decoder.start.ids,
            attention_mask=decoder.start.keep.long(),
            generation_config=settings.to_transformers(),
            logits_processor=hooks.processors(settings.processors(), settings.num_beams),
            stopping_criteria=hooks.criteria(settings.config.max_time),
            tokenizer=hooks.tokenizer,
            streamer=streamer,
        )
    if streamer is not None:
        streamer.raise_on_all_ranks()
    return texts


class _Scorer(PreTrainedModel, GenerationMixin):
    """The model that transformers' loop calls."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(PreTrainedConfig(vocab_size=decoder.vocab_size))
        self.decoder = decoder

    @property
    def device(self) -> torch.device:
        return self.decoder.stages.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> CausalLMOutput:
        with torch._C.DisableTorchFunction():  # the device context would look at each operation of the layers
            return CausalLMOutput(logits=self.decoder.scores(input_ids)[:, None])

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": input_ids}


class _Streamer(BaseStreamer):
    """Hands new tokens on. An error waits for the end of the text: other ranks would be left in their next pass.

    Args:
        stream: Called with new tokens.
        streamer: Another, which is given the prompts, too.
    """

    def __init__(self, stream: Callable[[torch.Tensor], Any] | None, streamer: Any) -> None:
        self.stream, self.streamer = stream, streamer
        self.here = process_groups.model_parallel().rank() == 0
        self.begun = False
        self.error: Exception | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.streamer is not None:
            self._call(lambda: self.streamer.put(value.cpu()))
        elif self.begun and self.stream is not None:
            stream = self.stream
            self._call(lambda: stream(value.cpu()))
        self.begun = True  # the first call brings the prompt

    def end(self) -> None:
        if self.streamer is not None:
            self._call(lambda: self.streamer.end())

    def raise_on_all_ranks(self) -> None:
        texts = collectives.gather(None if self.error is None else repr(self.error), process_groups.model_parallel())
        if texts[0] is not None:
            raise RuntimeError(f"generate: the stream callback has failed with {texts[0]}.") from self.error

    def _call(self, call: Callable[[], Any]) -> None:
        if self.here and self.error is None:
            try:
                call()
            except Exception as error:
                self.error = error
