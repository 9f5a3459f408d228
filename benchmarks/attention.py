"""One layer's core attention, forward and backward, by a pattern and by a dense mask of the same rows, in turn.

``python benchmarks/attention.py [--rounds 5]``; milliseconds of processor time, and bytes kept for the backward pass.
"""

import argparse
import statistics
import time

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from lightning_megatron.models.layers.attention import TorchAttention
from lightning_megatron.models.layers.attention_pattern import AttentionPattern, PatternParams

HEADS, GROUPS, SIZE = 8, 4, 64
# Name, rows, tokens of a row, mean tokens of a document, window.
CASES = [
    ("4 rows of 256, documents of 64", 4, 256, 64, None),
    ("4 rows of 1,024, documents of 32", 4, 1024, 32, None),
    ("4 rows of 1,024, documents of 256", 4, 1024, 256, None),
    ("a row of 4,096, documents of 512", 1, 4096, 512, None),
    ("a row of 4,096, a window of 256", 1, 4096, None, 256),
    ("4 rows of 1,024, padded behind", 4, 1024, None, None),
]


def layer(window: int | None) -> TorchAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
    )
    return TorchAttention(config, 1, AttnMaskType.causal, "self")


def pattern_of(rows: int, length: int, document: int | None, window: int | None) -> AttentionPattern:
    generator = torch.Generator().manual_seed(1)
    if document is not None:
        starts = torch.rand(rows, length, generator=generator) < 1 / document
        return AttentionPattern(length=length, documents=starts.cumsum(dim=1))
    if window is not None:
        return AttentionPattern(length=length)
    ends = torch.randint(length // 4, length, (rows, 1), generator=generator)
    return AttentionPattern(length=length, keep=torch.arange(length) < ends)


def step(attention: TorchAttention, tensors: list[torch.Tensor], **who: object) -> tuple[float, int]:
    """Milliseconds, and bytes that the backward pass keeps beyond the queries, keys and values."""
    kept = {tensor.untyped_storage().data_ptr(): 0 for tensor in tensors}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(*tensors, **who).sum().backward()
    return (time.process_time() - start) * 1e3, sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| rows | dense mask, ms | pattern, ms | ratio | dense mask, MB kept | pattern, MB kept |")
    print("|---|---|---|---|---|---|")
    for name, rows, length, document, window in CASES:
        tensors = [torch.randn(length, rows, n, SIZE, requires_grad=True) for n in (HEADS, GROUPS, GROUPS)]
        pattern, attention = pattern_of(rows, length, document, window), layer(window)
        dense = {"attention_mask": pattern.dense(None, torch.device("cpu"))}
        by_pattern = {"packed_seq_params": PatternParams(pattern)}
        seen: tuple[list[tuple[float, int]], ...] = ([], [])
        for number in range(rounds + 1):
            for side, who in zip(seen, (dense, by_pattern), strict=True):
                found = step(attention, tensors, **who)
                side.extend([found] if number else [])
        slow, fast = (statistics.median(ms for ms, _ in side) for side in seen)
        much, little = (side[0][1] / 1e6 for side in seen)
        print(f"| {name} | {slow:.0f} | {fast:.0f} | {slow / fast:.1f} | {much:.1f} | {little:.1f} |", flush=True)


if __name__ == "__main__":
    main()
