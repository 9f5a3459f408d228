"""A GPT for EleutherAI's evaluation harness; needs ``pip install "lightning-megatron[lm-eval]"``."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch.nn.utils.rnn import pad_sequence

from lightning_megatron.data.tokenizers import Tokenizer, load_tokenizer
from lightning_megatron.models.gpt.module import GPTModule


class HarnessGPT(TemplateLM):
    """What ``lm_eval.simple_evaluate(model=...)`` takes.

    Args:
        module: A GPT; one that is not built yet is built on this process alone. Under tensor parallelism all ranks
            evaluate; pipeline stages are not supported.
        tokenizer: "bytes", the path of a ``tokenizer.json``, a transformers folder, name or tokenizer.
        batch_size: Number of texts per forward pass.
        max_new_tokens: Longest answer to a task that does not say how long an answer may be.
    """

    def __init__(
        self, module: GPTModule, tokenizer: str | Tokenizer, batch_size: int = 8, max_new_tokens: int = 128
    ) -> None:
        super().__init__()
        if module.config.task != "causal_lm":
            raise ValueError(
                f"HarnessGPT needs a GPT that predicts tokens, and this one has GPTConfig(task={module.config.task!r})."
            )
        self.module = module if len(module.chunks) else module.build()
        self.module.eval()
        self.text = load_tokenizer(tokenizer)
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, and stands for an empty context."""
        return self.text.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, without special ones."""
        return self.text.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether it is what the model would have written."""
        longest = self.module.config.seq_length + 1
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            texts = [torch.tensor((requests[i][1] + requests[i][2])[-longest:], device="cpu") for i in batch]
            logits = self._logits(pad_sequence(texts, batch_first=True)[:, :-1])
            for i, text, scores in zip(batch, texts, logits, strict=True):
                count = min(len(requests[i][2]), len(text) - 1)
                wanted, given = text[-count:].to(scores.device), scores[len(text) - 1 - count : len(text) - 1]
                chosen = given.gather(1, wanted[:, None]).sum()
                found[i] = (float(chosen), bool((given.argmax(dim=-1) == wanted).all()))
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each whole text, in windows of the model's length."""
        totals = []
        for request in requests:
            ids, length = self.text.encode(request.args[0]), self.module.config.seq_length
            windows = utils.get_rolling_token_windows(ids, self.eot_token_id, length, 1)
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each text's continuation, up to the first of the strings that end it."""
        answers = []
        for request in requests:
            context, settings = request.args
            new = settings.get("max_gen_toks", self.max_new_tokens)
            ids = self.text.encode(context)[-(self.module.config.seq_length - new) :] or [self.eot_token_id]
            drawn = bool(settings.get("do_sample"))  # a task says so itself, whatever the model says
            draws = {"do_sample": drawn, **({"temperature": settings["temperature"]} if drawn else {})}
            text = self.module.generate(
                torch.tensor([ids], device="cpu"), max_new_tokens=new, eos_token_id=self.eot_token_id, **draws
            )
            answer = self.text.decode([t for t in text[0, len(ids) :].tolist() if t != self.eot_token_id])
            for end in (
                [settings.get("until", [])] if isinstance(settings.get("until"), str) else settings.get("until", [])
            ):
                answer = answer.partition(end)[0]
            answers.append(answer)
        return answers

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Log probabilities ``[b, s, vocab]``; padding is behind each text, where a causal model does not see it."""
        device = next(self.module.parameters()).device
        scores: torch.Tensor = self.module(input_ids=ids.to(device))
        return scores.float().log_softmax(-1)
