"""Measures tokens per second of ``generate`` against that of transformers, in one CPU process with the same weights.

    OMP_NUM_THREADS=1 python benchmarks/generate.py

The two sides run in turn and write the same text, token by token. The script prints a table of medians and ratios;
``benchmarks/README.md`` has the figures and the machine they are from.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

from lightning_megatron import AutoModule

ROUNDS, NEW = int(os.environ.get("ROUNDS", 5)), int(os.environ.get("NEW", 64))
BATCH, PROMPT = 4, 64
MODELS: dict[str, Callable[[], Any]] = {
    "GPT-2, 4 layers of 512": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=4, n_embd=512, n_head=8, vocab_size=8192, bos_token_id=0, eos_token_id=0)
    ),
    "GPT-2, 12 layers of 768": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=8192, bos_token_id=0, eos_token_id=0)
    ),
    "Llama, 4 layers of 512, 2 of 8 heads": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=4, hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=2,
            vocab_size=8192,
        )
    ),
    "T5, 4 and 4 layers of 512": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            num_layers=4, d_model=512, d_kv=64, d_ff=1024, num_heads=8, vocab_size=8192, decoder_start_token_id=0
        )
    ),
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "4 beams": {"num_beams": 4}}


class Seconds(NamedTuple):
    """What one text takes: by the clock, and of the processor, which other work on the machine disturbs less."""

    wall: float
    processor: float


def seconds(run: Callable[[], torch.Tensor]) -> tuple[Seconds, torch.Tensor]:
    start, used = time.perf_counter(), time.process_time()
    text = run()
    return Seconds(time.perf_counter() - start, time.process_time() - used), text


def compare(theirs: Any, ours: Any, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, list[Seconds]]:
    """The seconds that each side takes, round by round."""
    common = {"max_new_tokens": NEW, "pad_token_id": 0, **options}
    start = {"decoder_start_token_id": 0} if theirs.config.is_encoder_decoder else {}
    sides: dict[str, list[Seconds]] = {"theirs": [], "ours": []}
    for number in range(ROUNDS + 1):
        one, text = seconds(lambda: theirs.generate(ids, **start, **common))
        other, same = seconds(lambda: ours.generate(ids, **common))
        assert torch.equal(text, same)
        if number:  # the first is warm-up
            sides["theirs"].append(one)
            sides["ours"].append(other)
    return sides


def main() -> None:
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads; {BATCH} prompts of {PROMPT}, {NEW} new")
    print("| model | | transformers, tokens/s | ours | ratio of medians | of processor time: medians | minima |")
    print("|---|---|---|---|---|---|---|")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        theirs = make().eval()
        theirs.generation_config = transformers.GenerationConfig()
        ours = AutoModule.from_pretrained(theirs).build()
        ids = torch.randint(1, 8192, (BATCH, PROMPT))
        for way, options in WAYS.items():
            sides = compare(theirs, ours, ids, options)
            a, b = (statistics.median(one.wall for one in sides[side]) for side in ("theirs", "ours"))
            used = [[one.processor for one in sides[side]] for side in ("theirs", "ours")]
            middle, least = (which(used[0]) / which(used[1]) for which in (statistics.median, min))
            print(
                f"| {name} | {way} | {BATCH * NEW / a:.0f} | {BATCH * NEW / b:.0f} | {a / b:.2f} | {middle:.2f} |"
                f" {least:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
