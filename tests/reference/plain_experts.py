"""The truth of experts: ``plain_gpt`` whose feed-forward layers are a mixture, each expert computed for all tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron import Experts, GPTConfig
from tests.reference import plain_gpt
from tests.reference.plain_gpt import ADAM, LLAMA, Weights

MIXTURE = replace(
    LLAMA,
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=32,
    experts=Experts(num=4, top_k=2, ffn_hidden_size=24, balancing="seq_aux", aux_weight=0.1, z_weight=0.01),
)
# Odd sizes, a shared expert, a dense layer, weights that do not add up to 1.
ODD = replace(
    MIXTURE,
    vocab_size=61,
    experts=Experts(
        num=6, top_k=3, ffn_hidden_size=20, shared_ffn_hidden_size=28, normalize_top_k=False, layers=[1, 2, 3],
        balancing="global_aux", aux_weight=0.1,
    ),
)  # fmt: skip
BIASED = replace(
    MIXTURE, experts=Experts(num=4, top_k=2, ffn_hidden_size=24, router="sigmoid", balancing="bias", bias_rate=0.01)
)

# With these first weights no choice of an expert is a close one; by ``num``, ``balancing`` and ``capacity_factor``.
_SEEDS = {
    (4, "bias", None): 0,
    (6, "global_aux", None): 4,
    (4, "seq_aux", 1.25): 0,
    (4, "seq_aux", 1.249): 4,
    (4, "none", None): 4,
}


@dataclass
class Cut:
    """What is balanced, and dropped, by itself: the rows of each micro-batch, and the tokens of each rank in a row."""

    rows: list[list[int]]
    places: list[slice] = field(default_factory=lambda: [slice(None)])


@dataclass
class Seen:
    """What the routers of a step did, and what they keep from one step to the next, by layer."""

    counts: dict[int, torch.Tensor] = field(default_factory=dict)
    shares: dict[int, torch.Tensor] = field(default_factory=dict)
    biases: dict[int, torch.Tensor] = field(default_factory=dict)
    entropies: dict[int, float] = field(default_factory=dict)  # of a token's scores, a mean
    z_losses: dict[int, float] = field(default_factory=dict)  # without their weight, a mean
    dropped: dict[int, float] = field(default_factory=dict)  # of the choices
    losses: list[torch.Tensor] = field(default_factory=list)
    margin: float = float("inf")  # of the closest choice, relative; rounding must not change it

    def choose(self, scores: torch.Tensor, count: int, dim: int) -> torch.Tensor:
        """1 for the ``count`` largest along ``dim``."""
        best = scores.detach().topk(min(count + 1, scores.size(dim)), dim)
        if best.indices.size(dim) > count:
            last, next_ = best.values.narrow(dim, count - 1, 1), best.values.narrow(dim, count, 1)
            gaps = ((last - next_) / last.abs())[next_ != 0]  # 0 is an expert that was not chosen
            self.margin = min([self.margin, *gaps.flatten().tolist()])
        return torch.zeros_like(scores).scatter(dim, best.indices.narrow(dim, 0, count), 1)


def initial_weights(c: GPTConfig) -> Weights:
    """``plain_gpt``'s, with experts in place of the feed-forward layers that have them."""
    weights = plain_gpt.initial_weights(c)
    e = experts_of(c)
    generator = torch.Generator().manual_seed(_SEEDS.get((e.num, e.balancing, e.capacity_factor), 6))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.15

    layers = [f"decoder.layers.{n}.mlp." for n, has in enumerate(e.in_layers(c.num_layers)) if has]
    for layer in [*layers, *(f"mtp_block.layers.{n}.transformer_layer.mlp." for n in range(c.mtp))]:
        for name in ("linear_fc1", "linear_fc2"):
            del weights[f"{layer}{name}.weight"]
        width = e.ffn_hidden_size or c.ffn_hidden_size
        weights[f"{layer}router.weight"] = draw(e.num, c.hidden_size) * 2
        weights[f"{layer}experts.linear_fc1.weight"] = draw(e.num, 2 * width, c.hidden_size)
        weights[f"{layer}experts.linear_fc2.weight"] = draw(e.num, c.hidden_size, width)
        if e.shared_ffn_hidden_size:
            weights[f"{layer}shared_experts.linear_fc1.weight"] = draw(2 * e.shared_ffn_hidden_size, c.hidden_size)
            weights[f"{layer}shared_experts.linear_fc2.weight"] = draw(c.hidden_size, e.shared_ffn_hidden_size)
    return weights


def experts_of(c: GPTConfig) -> Experts:
    assert c.experts is not None
    return c.experts


def logits(c: GPTConfig, w: Weights, tokens: torch.Tensor, mask: torch.Tensor, cut: Cut, seen: Seen) -> torch.Tensor:
    """``[b, s, vocab]``; the losses of the routers, summed over the tokens of ``mask``, are added to ``seen``."""
    x = w["embedding.word_embeddings.weight"][tokens]
    places = torch.arange(tokens.size(1))
    sees = places[:, None] >= places
    for n, has in enumerate(experts_of(c).in_layers(c.num_layers)):
        layer = f"decoder.layers.{n}."
        normed = plain_gpt._normalise(c, w, layer + "input_layernorm", x)
        x = x + plain_gpt._attention(c, w, layer + "self_attention.", normed, places.expand_as(tokens), sees)
        normed = plain_gpt._normalise(c, w, layer + "pre_mlp_layernorm", x)
        x = x + (mixture(c, w, n, normed, mask, cut, seen) if has else plain_gpt._mlp(c, w, layer + "mlp.", normed))
    return plain_gpt._normalise(c, w, "decoder.final_layernorm", x) @ w["output_layer.weight"].T


def train(
    c: GPTConfig, samples: dict[str, torch.Tensor], rows: int, steps: int, clip: float, cut: Cut | None = None,
    make: Callable[[Weights], Any] = lambda weights: torch.optim.AdamW(weights.values(), **ADAM),
    dtype: torch.dtype = torch.float32,
    adapted: tuple[Weights, Callable[[Weights], Weights]] | None = None,
    means: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Losses of the text, gradient norms and final weights, on batches of ``rows``.

    Args:
        c: The configuration.
        samples: The rows.
        rows: Rows of a batch.
        steps: Optimizer steps.
        clip: The largest gradient norm.
        cut: What is balanced, and dropped, by itself.
        make: Makes the optimizer of the weights.
        dtype: Type in which the model computes its products, but for the router; weights are fp32.
        adapted: What is trained in place of the weights, and what makes the model's weights of that.
        means: Whether the mean of each part of ``cut`` counts by its rows, not by its tokens.
    """
    e = experts_of(c)
    start, of_model = adapted or (initial_weights(c), lambda trained: trained)
    w = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = make(w)
    cut = cut or Cut([list(range(rows))])
    seen, losses, norms, extra = Seen(), [], [], []
    for batch in plain_gpt.batches(samples, rows, steps):
        seen.counts, seen.losses = {}, []
        mask = batch["loss_mask"].clone()
        for part in cut.rows if means else ():
            mask[part] *= len(part) / rows / mask[part].sum()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = logits(c, of_model(w), batch["tokens"], mask, cut, seen).flatten(0, 1).float()
        each = (F.cross_entropy(found, batch["labels"].flatten(), reduction="none") * mask.flatten()).sum() / mask.sum()
        added = torch.stack(seen.losses).sum() / mask.sum() if seen.losses else torch.zeros(())
        for value in w.values():
            value.grad = None
        (each + added).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(w.values(), clip)))
        optimizer.step()
        losses.append(float(each.detach()))
        extra.append(float(added.detach()))
        for n, counts in seen.counts.items():
            seen.shares[n] = counts / counts.sum()
            biases = seen.biases.get(n, torch.zeros(e.num))
            if f"decoder.layers.{n}.mlp.router.weight" not in w:
                continue
            seen.biases[n] = biases + e.bias_rate * (counts.mean() - counts).sign()
    weights = {name: value.detach() for name, value in w.items()}
    return {"losses": losses, "norms": norms, "weights": weights, "added": extra, "seen": seen}


def mixture(
    c: GPTConfig, w: Weights, n: int, x: torch.Tensor, mask: torch.Tensor, cut: Cut, seen: Seen, name: str = ""
) -> torch.Tensor:
    """The mixture of layer ``n``, or of one that is called ``name``."""
    e, layer = experts_of(c), name or f"decoder.layers.{n}.mlp."
    with torch.autocast("cpu", enabled=False):
        scores_in = x.float() @ w[f"{layer}router.weight"].T  # [b, s, experts]
    if e.router == "softmax":
        scores = scores_in.softmax(-1)
        chosen = seen.choose(scores, e.top_k, -1)
        shares = scores
    else:
        scores = scores_in.sigmoid()
        chosen = seen.choose(scores + seen.biases.get(n, torch.zeros(e.num)), e.top_k, -1)
        shares = scores / scores.sum(-1, keepdim=True)
    weights = scores * chosen
    if e.normalize_top_k:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * e.scale
    seen.counts[n] = (chosen * mask[..., None]).sum((0, 1))
    seen.entropies[n] = float(-(shares * shares.log()).sum(-1)[mask > 0].mean().detach())
    seen.z_losses[n] = float(scores_in.logsumexp(-1).square()[mask > 0].mean().detach())
    seen.dropped[n] = 0.0
    _add_losses(e, n, scores_in, shares, chosen, mask, cut, seen)
    if e.capacity_factor is not None:
        kept = _kept(e, weights, chosen, cut, seen)
        seen.dropped[n] = 1 - float((kept * chosen).sum() / chosen.sum())
        weights = weights * kept
    up = torch.einsum("bsh,eoh->bseo", x, w[f"{layer}experts.linear_fc1.weight"])
    gate, linear = up.chunk(2, -1)
    inner = (F.silu(gate) * linear * weights[..., None]).to(x.dtype)  # what an expert gives is linear in it
    output = torch.einsum("bsef,ehf->bseh", inner, w[f"{layer}experts.linear_fc2.weight"]).sum(2)
    if e.shared_ffn_hidden_size:
        output = output + plain_gpt._mlp(c, w, f"{layer}shared_experts.", x)
    return output


def _add_losses(
    e: Experts, n: int, logits: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor, mask: torch.Tensor,
    cut: Cut, seen: Seen,
) -> None:  # fmt: skip
    """Add ``weight · tokens · loss`` of each unit that is balanced by itself."""
    if e.z_weight:
        seen.losses.append(e.z_weight * (logits.logsumexp(-1).square() * mask).sum())
    units = {"seq_aux": [[row] for row in range(len(mask))], "aux": cut.rows, "global_aux": [list(range(len(mask)))]}
    for rows in units.get(e.balancing, []):
        counted = mask[rows]
        tokens = counted.sum()
        found = (chosen[rows] * counted[..., None]).sum((0, 1)) / (tokens * e.top_k)
        if e.balancing == "global_aux":
            found = seen.shares.get(n, torch.full((e.num,), 1 / e.num))
        mean = (shares[rows] * counted[..., None]).sum((0, 1)) / tokens
        seen.losses.append(e.aux_weight * tokens * e.num * (found * mean).sum())


def _kept(e: Experts, weights: torch.Tensor, chosen: torch.Tensor, cut: Cut, seen: Seen) -> torch.Tensor:
    """1 where an expert takes a token: of each rank's tokens of a micro-batch, those with the largest weights."""
    kept = torch.zeros_like(weights)
    for rows in cut.rows:
        for places in cut.places:
            part = (weights * chosen)[rows][:, places].flatten(0, 1)
            room = -(-len(part) * e.top_k * e.capacity_factor // e.num)  # type: ignore[operator]
            taken = seen.choose(part, min(int(room), len(part)), 0)
            block = kept[rows]
            block[:, places] = taken.view(len(rows), -1, e.num)
            kept[rows] = block
    return kept
