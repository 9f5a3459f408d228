"""Draw the picture of ``docs/long_sequences.md``: the memory of a rank by the length of its sequences, for several cp.

python docs/draw_memory.py docs/images/long-sequences.png
"""

import argparse
from pathlib import Path

from matplotlib import pyplot

from lightning_megatron import GPTConfig, ParallelLayout

LENGTHS = [2**power for power in range(12, 18)]  # 4k to 128k
LIKE_LLAMA_8B = {
    "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8,
    "vocab_size": 128256, "seq_length": LENGTHS[-1], "position_embedding": "rope", "normalization": "RMSNorm",
    "activation": "swiglu", "bias": False, "tie_embeddings": False,
}  # fmt: skip


def gigabytes(cp: int, length: int, recompute: str | None) -> float:
    """What a rank of 16 takes, of which two share each layer."""
    layout = ParallelLayout(world_size=16, tp=2, cp=cp, sequence_parallel=True)
    return layout.memory(GPTConfig(**LIKE_LLAMA_8B), lengths=(length,), recompute=recompute).largest.total / 1e9


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="the .png to write")
    picture = parser.parse_args().picture
    figure, sides = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for axes, recompute in zip(sides, ("selective", "full"), strict=True):
        for cp in (1, 2, 4, 8):
            axes.plot(LENGTHS, [gigabytes(cp, length, recompute) for length in LENGTHS], "o-", label=f"cp={cp}")
        axes.axhline(72, color="grey", linestyle="--", linewidth=1)
        axes.text(LENGTHS[0], 74, "72 of 80 GB", fontsize=8, color="grey")
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, [f"{length // 1024}k" for length in LENGTHS])
        axes.set(title=f'recompute="{recompute}"', xlabel="tokens of a sequence", ylim=(0, 160))
        axes.grid(alpha=0.3)
    sides[0].set_ylabel("GB of a rank")
    sides[1].legend()
    figure.suptitle("Llama 3.1 8B in bf16 on 16 GPUs, tp=2 with sequence parallelism, by the estimate", fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
