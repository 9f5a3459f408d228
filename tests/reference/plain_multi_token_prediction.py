"""The truth of multi-token prediction: ``plain_gpt`` with layers that predict the tokens behind the next one."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron import Experts, GPTConfig
from tests.reference import plain_experts, plain_gpt
from tests.reference.plain_gpt import ADAM, LLAMA, Weights

DEEPER = replace(LLAMA, num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, mtp=2, mtp_weight=0.4)
TIED = replace(DEEPER, tie_embeddings=True, vocab_size=61, embedding_multiplier=1.5, mtp=1)
BIASED = replace(DEEPER, normalization="LayerNorm", activation="gelu", bias=True, position_embedding="none")
# As DeepSeek-V3: latents, a dense first layer, experts behind it and in the layer of later tokens.
DEEPSEEK = replace(
    plain_gpt.LATENT,
    num_layers=5,
    ffn_hidden_size=40,
    mtp=1,
    mtp_weight=0.4,
    experts=Experts(
        num=6, top_k=3, ffn_hidden_size=20, shared_ffn_hidden_size=28, router="sigmoid", scale=2.5, balancing="none",
        layers=[1, 2, 3, 4],
    ),
)  # fmt: skip


def train(
    c: GPTConfig, samples: dict[str, torch.Tensor], rows: int, steps: int, clip: float, weigh: bool = True
) -> dict[str, Any]:
    """Losses of the next tokens, gradient norms and final weights of AdamW on batches of ``rows``.

    A sum over the tokens of a batch is divided by the tokens that count for the next ones. ``weigh=False`` leaves
    multi-token prediction out.
    """
    start = (plain_gpt if c.experts is None else plain_experts).initial_weights(c)
    w = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer, chosen = torch.optim.AdamW(w.values(), **ADAM), plain_experts.Seen()
    losses, norms = [], []
    for batch in plain_gpt.batches(samples, rows, steps):
        loss, later = _losses(c, w, batch, chosen)
        optimizer.zero_grad()
        (loss + c.mtp_weight * later * weigh).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(w.values(), clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert chosen.margin > 2e-5, f"a choice is too close for a comparison: {chosen.margin}"
    return {"losses": losses, "norms": norms, "weights": {name: value.detach() for name, value in w.items()}}


def _losses(
    c: GPTConfig, w: Weights, batch: dict[str, torch.Tensor], chosen: plain_experts.Seen
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the next tokens, and the mean over the layers of those of later ones."""

    def feed_forward(c: GPTConfig, w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
        if f"{name}router.weight" not in w:
            return plain_gpt._mlp(c, w, name, x)
        return plain_experts.mixture(c, w, -1, x, mask, plain_experts.Cut([]), chosen, name)

    tokens, labels, mask = batch["tokens"], batch["labels"], batch["loss_mask"]
    positions, seen = plain_gpt.seen_from(tokens, batch.get("position_ids"))
    scaled = {**w, "embedding.word_embeddings.weight": w["embedding.word_embeddings.weight"] * c.embedding_multiplier}
    x, count, later = (
        plain_gpt.hidden_states(c, scaled, tokens, positions, seen, feed_forward=feed_forward),
        mask.sum(),
        [],
    )

    def summed(x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(plain_gpt.output(c, w, x).transpose(1, 2), labels, reduction="none") * mask).sum()

    loss = summed(x, labels, mask) / count
    for n in range(c.mtp):
        name, places = f"mtp_block.layers.{n}.", n + 1
        known = scaled["embedding.word_embeddings.weight"][tokens.roll(-places, 1)]
        both = [plain_gpt._normalise(c, w, name + "enorm", known), plain_gpt._normalise(c, w, name + "hnorm", x)]
        x = plain_gpt._linear(w, name + "eh_proj", torch.cat(both, -1))
        x = plain_gpt.layer(c, w, name + "transformer_layer.", x, positions, seen, feed_forward)
        x = plain_gpt._normalise(c, w, name + "final_layernorm", x)
        counted = mask.roll(-places, 1) * (positions.roll(-places, 1) - positions == places)
        later.append(summed(x, labels.roll(-places, 1), counted) / count)
    return loss, torch.stack(later).mean()
