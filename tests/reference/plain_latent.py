"""Multi-latent attention in plain PyTorch, a head at a time where that is clearer; ``plain_gpt`` uses it."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron import GPTConfig, LatentAttention

Weights = dict[str, torch.Tensor]


def initial_weights(c: GPTConfig, name: str, draw: Any) -> Weights:
    """The weights of one layer's attention; ``name`` begins their names."""
    a, h, n = _latent(c), c.hidden_size, c.num_attention_heads
    queries = n * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    if a.q_lora_rank is None:
        weights = {"linear_q_proj": draw(queries, h)}
    else:
        weights = {
            "linear_q_down_proj": draw(a.q_lora_rank, h) * 3,
            "linear_q_up_proj": draw(queries, a.q_lora_rank),
            "q_layernorm": 1 + draw(a.q_lora_rank),
        }
    weights["linear_kv_down_proj"] = draw(a.kv_lora_rank + a.qk_rope_head_dim, h) * 3
    weights["linear_kv_up_proj"] = draw(n * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank)
    weights["kv_layernorm"] = 1 + draw(a.kv_lora_rank)
    weights["linear_proj"] = draw(h, n * a.v_head_dim)
    return {f"{name}{each}.weight": value for each, value in weights.items()}


def attention(
    c: GPTConfig, w: Weights, name: str, x: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """``[b, s, h]`` of ``[b, s, h]``."""
    a, n = _latent(c), c.num_attention_heads
    b, s, _ = x.shape
    epsilon = c.layernorm_epsilon if a.norm_epsilon is None else a.norm_epsilon

    def linear(which: str, y: torch.Tensor) -> torch.Tensor:
        return y @ w[f"{name}{which}.weight"].T

    def norm(which: str, y: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(y, (y.size(-1),), w[f"{name}{which}.weight"], epsilon)

    if a.q_lora_rank is None:
        q = linear("linear_q_proj", x)
    else:
        q = linear("linear_q_up_proj", norm("q_layernorm", linear("linear_q_down_proj", x)))
    q = q.view(b, s, n, -1)
    down = linear("linear_kv_down_proj", x)
    latent, shared = down[..., : a.kv_lora_rank], down[..., a.kv_lora_rank :]
    wide = linear("linear_kv_up_proj", norm("kv_layernorm", latent)).view(b, s, n, -1)
    k, v = wide[..., : a.qk_nope_head_dim], wide[..., a.qk_nope_head_dim :]
    angles, factor, scale = _angles(c, positions)
    turned = _rotate(q[..., a.qk_nope_head_dim :], angles, a.rope_interleave) * factor
    key = _rotate(shared[:, :, None], angles, a.rope_interleave) * factor
    scores = torch.einsum("bqnd,bknd->bnqk", q[..., : a.qk_nope_head_dim], k)
    scores = scores + torch.einsum("bqnd,bkd->bnqk", turned, key[:, :, 0])
    scores = (scores * scale).masked_fill(~seen, float("-inf"))
    mixed = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v)
    return linear("linear_proj", mixed.reshape(b, s, -1))


def _latent(c: GPTConfig) -> LatentAttention:
    assert c.latent_attention is not None
    return c.latent_attention


def _angles(c: GPTConfig, positions: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Angles ``[b, s, pairs]``, the factor on rotated channels, and that on the scores (YaRN, arXiv 2309.00071)."""
    a = _latent(c)
    size, scale = a.qk_rope_head_dim, (a.qk_nope_head_dim + a.qk_rope_head_dim) ** -0.5
    frequencies = c.rotary_base ** -(torch.arange(0, size, 2) / size)
    if c.rope_scaling is None:
        return positions[..., None] * frequencies, 1.0, scale
    given = c.rope_scaling

    def pair(rotations: float) -> float:
        """The pair that turns so often over the length of the first training."""
        length = given["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return size * math.log(length) / (2 * math.log(c.rotary_base))

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(given["factor"]) + 1

    low, high = max(math.floor(pair(given["beta_fast"])), 0), min(math.ceil(pair(given["beta_slow"])), size - 1)
    ramp = ((torch.arange(size // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = frequencies / given["factor"] * ramp + frequencies * (1 - ramp)
    factor = magnitude(given["mscale"]) / magnitude(given["mscale_all_dim"])
    return positions[..., None] * frequencies, factor, scale * magnitude(given["mscale_all_dim"]) ** 2


def _rotate(x: torch.Tensor, angles: torch.Tensor, neighbours: bool) -> torch.Tensor:
    """``[b, s, heads, channels]``, each pair of channels turned as a complex number."""
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    first, second = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)
