"""The truth: a GPT in plain PyTorch, one process, fp32; its weights carry megatron-core's names, unsharded."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron import GPTConfig, LatentAttention
from tests.reference import plain_latent

Weights = dict[str, torch.Tensor]
FeedForward = Callable[[GPTConfig, Weights, str, torch.Tensor], torch.Tensor]

GPT2 = GPTConfig(
    num_layers=8, hidden_size=32, num_attention_heads=4, vocab_size=64, seq_length=16, make_vocab_size_divisible_by=16
)
LLAMA = GPTConfig(
    num_layers=8,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=96,
    vocab_size=64,
    seq_length=16,
    position_embedding="rope",
    normalization="RMSNorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
    make_vocab_size_divisible_by=16,
)
WINDOWED = replace(LLAMA, num_layers=4, sliding_window=5)
PACKED = replace(LLAMA, num_layers=4)  # on rows of several documents, see parallel_gpt.packed_samples
PACKED_GPT2 = replace(GPT2, num_layers=4)
# Sizes of heads that all differ; YaRN, by which only a part of a head grows.
LATENT = replace(
    LLAMA,
    num_layers=4,
    hidden_size=48,
    num_attention_heads=4,
    num_query_groups=None,
    latent_attention=LatentAttention(
        q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=12
    ),
    rotary_base=100,
    rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 2.0, "beta_slow": 0.25,
        "mscale": 1.0, "mscale_all_dim": 0.7,
    },
)  # fmt: skip
# Without latents of queries; values larger than keys; rotated as Llama rotates.
LATENT_LITE = replace(
    LATENT,
    rope_scaling=None,
    latent_attention=LatentAttention(
        kv_lora_rank=22, qk_nope_head_dim=6, qk_rope_head_dim=6, v_head_dim=16, rope_interleave=False,
        norm_epsilon=1e-2,
    ),
)  # fmt: skip
PACKED_LATENT = LATENT
# A vocabulary that no tensor-parallel size divides: 61 of 64 rows at tp = 1 and 2, 61 of 96 at tp = 3 or 6.
ODD = replace(
    GPT2, vocab_size=61, seq_length=18, make_vocab_size_divisible_by=32, hidden_size=24, num_attention_heads=6
)
ODD_UNTIED = replace(ODD, tie_embeddings=False)
# Adam's division magnifies gradients that are nothing but rounding (of key biases); a large eps keeps that small.
ADAM: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def initial_weights(c: GPTConfig) -> Weights:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.08

    h, head = c.hidden_size, c.hidden_size // c.num_attention_heads
    groups, ffn = c.num_query_groups or c.num_attention_heads, c.ffn_hidden_size or 4 * h
    weights = {"embedding.word_embeddings.weight": draw(c.vocab_size, h)}
    if c.position_embedding == "learned":
        weights["embedding.position_embeddings.weight"] = draw(c.seq_length, h)
    layers = [f"decoder.layers.{n}." for n in range(c.num_layers)]
    for n in range(c.mtp):
        later = f"mtp_block.layers.{n}."
        weights[f"{later}eh_proj.weight"] = draw(h, 2 * h)
        for name in ("enorm", "hnorm", "final_layernorm"):
            _norm(weights, later + name, c, draw)
        layers.append(f"{later}transformer_layer.")
    for layer in layers:
        attention = {
            "self_attention.linear_qkv": ((c.num_attention_heads + 2 * groups) * head, h),
            "self_attention.linear_proj": (h, h),
        }
        if c.latent_attention is not None:
            attention = {}
            weights |= plain_latent.initial_weights(c, f"{layer}self_attention.", draw)
        shapes = {
            **attention,
            "mlp.linear_fc1": (ffn * (2 if c.activation == "swiglu" else 1), h),
            "mlp.linear_fc2": (h, ffn),
        }
        for name, shape in shapes.items():
            weights[f"{layer}{name}.weight"] = draw(*shape)
            if c.bias:
                weights[f"{layer}{name}.bias"] = draw(shape[0])
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            _norm(weights, layer + name, c, draw)
        if c.extra.get("qk_layernorm"):
            for name in ("q_layernorm", "k_layernorm"):
                _norm(weights, f"{layer}self_attention.{name}", c, draw, head)
        if getattr(c, "has_sinks", False):
            weights[f"{layer}self_attention.core_attention.softmax_offset"] = draw(c.num_attention_heads) * 10
    _norm(weights, "decoder.final_layernorm", c, draw)
    if not c.tie_embeddings:
        weights["output_layer.weight"] = draw(c.vocab_size, h)
    return weights


def logits(c: GPTConfig, w: Weights, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """``[b, s, vocab]``; where ``positions`` ``[b, s]`` do not go on by one, another document begins."""
    return output(c, w, hidden_states(c, w, tokens, *seen_from(tokens, positions, c.sliding_window)))


def seen_from(
    tokens: torch.Tensor, positions: torch.Tensor | None, window: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of each token ``[b, s]``, and which tokens each looks at."""
    places = torch.arange(tokens.size(1))
    seen = places[:, None] >= places
    if window is not None:
        seen = seen & (places[:, None] - places < window)
    if positions is None:
        return places.expand_as(tokens), seen
    documents = F.pad(positions.diff(dim=1) != 1, (1, 0)).cumsum(dim=1)
    return positions, (seen & (documents[:, :, None] == documents[:, None]))[:, None]


def hidden_states(
    c: GPTConfig, w: Weights, tokens: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, **parts: FeedForward
) -> torch.Tensor:
    """``[b, s, h]``, behind the last norm."""
    x = w["embedding.word_embeddings.weight"][tokens]
    if c.position_embedding == "learned":
        x = x + w["embedding.position_embeddings.weight"][positions]
    for n in range(c.num_layers):
        x = layer(c, w, f"decoder.layers.{n}.", x, positions, seen, **parts)
    return _normalise(c, w, "decoder.final_layernorm", x)


def layer(
    c: GPTConfig, w: Weights, name: str, x: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor,
    feed_forward: FeedForward | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention and feed-forward of one layer."""
    x = x + _attention(c, w, name + "self_attention.", _normalise(c, w, name + "input_layernorm", x), positions, seen)
    return x + (feed_forward or _mlp)(c, w, name + "mlp.", _normalise(c, w, name + "pre_mlp_layernorm", x))


def output(c: GPTConfig, w: Weights, x: torch.Tensor) -> torch.Tensor:
    """The logits of hidden states."""
    return x @ w["embedding.word_embeddings.weight" if c.tie_embeddings else "output_layer.weight"].T


def batches(samples: dict[str, torch.Tensor], rows: int, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first ``steps`` batches of ``rows`` of the samples."""
    for step in range(steps):
        yield {name: value[step * rows : (step + 1) * rows] for name, value in samples.items()}


def mean_loss(c: GPTConfig, w: Weights, batch: dict[str, torch.Tensor], **terms: float) -> torch.Tensor:
    """The loss of a batch, over the tokens that its loss mask keeps."""
    labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
    return mean_with_terms(logits(c, w, batch["tokens"], batch.get("position_ids")), labels, **terms)


def mean_with_terms(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
    """Over the labels that are not −100, of logits ``[b, s, vocab]``."""
    kept, ids = logits[labels != -100], labels[labels != -100]
    cross_entropy = F.cross_entropy(kept, ids, label_smoothing=label_smoothing)
    return cross_entropy + z_loss * kept.logsumexp(-1).square().mean()


def train(
    c: GPTConfig,
    samples: dict[str, torch.Tensor],
    rows: int,
    steps: int,
    clip: float,
    micro_batches: list[slice] | None = None,
    make: Callable[[Weights], Any] = lambda weights: torch.optim.AdamW(weights.values(), **ADAM),
    **terms: float,
) -> dict[str, Any]:
    """Losses, gradient norms and final weights of AdamW on batches of ``rows``, every token counting once.

    With ``micro_batches`` (rows of a batch), a loss is the mean of their means instead; ``make`` makes the optimizer.
    ``terms`` are ``label_smoothing`` and ``z_loss``.
    """
    w = {name: value.clone().requires_grad_() for name, value in initial_weights(c).items()}
    optimizer = make(w)
    losses, norms = [], []
    for batch in batches(samples, rows, steps):
        parts = [{name: value[part] for name, value in batch.items()} for part in micro_batches or [slice(None)]]
        loss = torch.stack([mean_loss(c, w, part, **terms) for part in parts]).mean()
        for weight in w.values():
            weight.grad = None
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(w.values(), clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "weights": {name: value.detach() for name, value in w.items()}}


def _norm(weights: Weights, name: str, c: GPTConfig, draw: Any, width: int | None = None) -> None:
    width = width or c.hidden_size
    weights[f"{name}.weight"] = 1 + draw(width)
    if c.normalization == "LayerNorm":
        weights[f"{name}.bias"] = draw(width)


def _normalise(c: GPTConfig, w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    shape = (x.size(-1),)
    if c.normalization == "RMSNorm":
        return F.rms_norm(x, shape, w[f"{name}.weight"], c.layernorm_epsilon)
    return F.layer_norm(x, shape, w[f"{name}.weight"], w[f"{name}.bias"], c.layernorm_epsilon)


def _linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _attention(
    c: GPTConfig, w: Weights, name: str, x: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    if c.latent_attention is not None:
        return plain_latent.attention(c, w, name, x, positions, seen)
    b, s, _ = x.shape
    head, groups = c.hidden_size // c.num_attention_heads, c.num_query_groups or c.num_attention_heads
    per_group = c.num_attention_heads // groups
    qkv = _linear(w, f"{name}linear_qkv", x).view(b, s, groups, per_group + 2, head)
    q = qkv[..., :per_group, :].reshape(b, s, -1, head)
    k, v = (qkv[..., per_group + i, :].repeat_interleave(per_group, dim=2) for i in (0, 1))
    if c.extra.get("qk_layernorm"):
        q, k = (_normalise(c, w, f"{name}{which}_layernorm", y) for which, y in (("q", q), ("k", k)))
    if c.extra.get("qk_l2_norm"):
        q, k = (F.rms_norm(y, (head,), eps=c.layernorm_epsilon) for y in (q, k))
    if c.position_embedding == "rope":
        q, k = (_rotate(y, positions, c.rotary_base) for y in (q, k))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / head**0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    sinks = w.get(f"{name}core_attention.softmax_offset")  # one more score for each head, of nothing
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(b, -1, s, 1)], -1)
    mixed = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1)[..., :s], v)
    return _linear(w, f"{name}linear_proj", mixed.reshape(b, s, -1))


def _rotate(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    head = x.size(-1)
    angles = positions[..., None].float() / base ** (torch.arange(0, head, 2).float() / head)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, :, None, :] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _mlp(c: GPTConfig, w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    y = _linear(w, f"{name}linear_fc1", x)
    if c.activation == "swiglu":
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    else:
        y = F.gelu(y)
    return _linear(w, f"{name}linear_fc2", y)
