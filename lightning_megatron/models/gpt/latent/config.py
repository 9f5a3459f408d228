"""``LatentAttention``: the sizes of multi-latent attention, by DeepSeek's names, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_megatron.checkpoint.plain_classes import plain_class
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

# megatron-core's fields that are set here, and those that mean nothing beside them.
_OWN_FIELDS = {
    "rotary_interleaved": "LatentAttention(rope_interleave=...)",
    "qk_layernorm": "nothing in its place: latents have norms of their own",
    "qk_l2_norm": "nothing in its place: latents have norms of their own",
    "attention_output_gate": "nothing in its place",
}


@answer_wrong_names
@plain_class
@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-latent attention in place of a GPT's attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Each token has one latent of ``kv_lora_rank`` numbers, from which a linear layer makes the keys and values of all
    heads, and one further key of ``qk_rope_head_dim`` channels that all heads share. That part of a head knows the
    token's place; the ``qk_nope_head_dim`` other channels do not. Scores are divided by the root of both together.

    Args:
        q_lora_rank: Size of a latent from which queries are made, as DeepSeek-V2 and V3 have it. None: queries are made
            of the hidden states, as in DeepSeek-V2-Lite.
        kv_lora_rank: Size of the latent of keys and values.
        qk_nope_head_dim: Channels of a query's and a key's head that are not rotated.
        qk_rope_head_dim: Channels of it that are rotated; an even number.
        v_head_dim: Channels of a value's head.
        rope_interleave: Whether the two channels of a pair that is rotated lie side by side, as in DeepSeek's weights,
            not half of the channels apart.
        norm_epsilon: Added to the variance in the norms of latents. None: the model's ``layernorm_epsilon``.

    Raises:
        ValueError: A number out of range.
    """

    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True
    norm_epsilon: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        arguments = Arguments("LatentAttention")
        arguments.whole(
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        arguments.whole(optional=True, q_lora_rank=self.q_lora_rank)
        arguments.flag(rope_interleave=self.rope_interleave)
        arguments.number(least=0, optional=True, norm_epsilon=self.norm_epsilon)
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"LatentAttention(qk_rope_head_dim={self.qk_rope_head_dim}): channels are rotated in pairs. Use"
                f" {self.qk_rope_head_dim + 1}."
            )

    @property
    def qk_head_dim(self) -> int:
        """Channels of a query's and of a key's head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def divided(self) -> dict[str, int | None]:
        """What tensor-parallel ranks share: the rows of the layers that make latents."""
        return {
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank + qk_rope_head_dim": self.kv_lora_rank + self.qk_rope_head_dim,
        }

    def linear_layers(self, hidden: int, heads: int) -> dict[str, tuple[int, int]]:
        """Columns and rows of the linear layers, all of whose rows are divided, but for the output's columns."""
        if self.q_lora_rank is None:
            found = {"linear_q_proj": (hidden, heads * self.qk_head_dim)}
        else:
            found = {
                "linear_q_down_proj": (hidden, self.q_lora_rank),
                "linear_q_up_proj": (self.q_lora_rank, heads * self.qk_head_dim),
            }
        return {
            **found,
            "linear_kv_down_proj": (hidden, self.kv_lora_rank + self.qk_rope_head_dim),
            "linear_kv_up_proj": (self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim)),
            "linear_proj": (heads * self.v_head_dim, hidden),
        }

    def products(self, hidden: int, heads: int) -> int:
        """The numbers of all linear layers, each of which multiplies one number of each token."""
        return sum(inputs * outputs for inputs, outputs in self.linear_layers(hidden, heads).values())

    @property
    def normed(self) -> int:
        """The sizes of all latents that are normalised, together."""
        return self.kv_lora_rank + (self.q_lora_rank or 0)

    def settings(self, rope_scaling: Mapping[str, Any] | None) -> dict[str, Any]:
        """What megatron-core's layer reads from its configuration.

        Frequencies are the model's (``rotary_pos_emb``), so that positions may be any; of YaRN the layer computes the
        scale of the scores alone.
        """
        scaling = rope_scaling or {}
        return {
            "latent_attention": self,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_head_dim": self.qk_nope_head_dim,
            "qk_pos_emb_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "rope_type": "rope",
            "rotary_base": 10000,
            "rotary_percent": 1.0,
            "rotary_scaling_factor": scaling.get("factor", 1.0),
            "mscale_all_dim": scaling.get("mscale_all_dim") or 0.0,
            "cache_mla_latents": False,
        }


def refuse_own_fields(of: str, extra: Mapping[str, Any]) -> None:
    """Refuse fields of megatron-core's configuration that ``LatentAttention`` sets, or that it does not have.

    Raises:
        ValueError: Says what to use.
    """
    for name in extra:
        if name in _OWN_FIELDS:
            raise ValueError(f"{of}(latent_attention=..., extra={{{name!r}: ...}}): use {_OWN_FIELDS[name]}.")
