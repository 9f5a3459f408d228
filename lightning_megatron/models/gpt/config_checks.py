"""Refuses settings of a GPT that do not go together; each function takes a ``GPTConfig`` and raises ``ValueError``."""

from __future__ import annotations

from typing import Any

from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.models.heads import settings as heads

TASKS = ("causal_lm", "sequence_classification", "token_classification", "question_answering")


def check_norms(config: Any) -> None:
    """Refuse norms that do not go together."""
    if config.shared_norm and not (config.parallel_residual and config.norm_placement == "pre"):
        raise ValueError("GPTConfig(shared_norm=True) needs parallel_residual=True and norm_placement='pre'.")
    if config.joint_qk_norm and not (config.extra.get("qk_layernorm") and config.normalization == "RMSNorm"):
        raise ValueError(
            "GPTConfig(joint_qk_norm=True) needs extra={'qk_layernorm': True} and normalization='RMSNorm'."
        )


def check_mtp(config: Any) -> None:
    """Refuse positions that the embedding on the last stage would lack, and megatron-core's own fields."""
    arguments = Arguments("GPTConfig")
    arguments.number(least=0, mtp_weight=config.mtp_weight)
    if isinstance(config.mtp, bool) or not isinstance(config.mtp, int) or config.mtp < 0:
        raise ValueError(f"GPTConfig(mtp={config.mtp!r}): use the number of layers, such as 1; 0 has none.")
    longest = min(config.num_layers, config.seq_length - 1 if config.seq_length else config.num_layers)
    if config.mtp > max(longest, 1):
        raise ValueError(
            f"GPTConfig(mtp={config.mtp}): each is a whole layer that predicts one token further on; no more than the"
            f" model's own num_layers={config.num_layers}, and fewer than the tokens of a row. Use 1, as DeepSeek-V3."
        )
    if config.mtp and config.position_embedding == "learned":
        raise ValueError(
            f"GPTConfig(mtp={config.mtp}) needs position_embedding='rope' or 'none': a token that is predicted with"
            " has no learned position of its own."
        )
    for name, ours in (("mtp_num_layers", "mtp"), ("mtp_loss_scaling_factor", "mtp_weight")):
        if name in config.extra:
            raise ValueError(f"GPTConfig(extra={{{name!r}: ...}}): use GPTConfig({ours}=...).")


def check_task(config: Any) -> None:
    """Refuse what a head with labels does not have."""
    config._one_of("task", config.task, TASKS)
    heads.check(config)
    arguments = Arguments("GPTConfig")
    arguments.number(least=0, below=1, classifier_dropout=config.classifier_dropout)
    arguments.whole(0, optional=True, pad_token_id=config.pad_token_id)
    if config.task != "causal_lm" and config.mtp:
        raise ValueError(
            f"GPTConfig(task={config.task!r}, mtp={config.mtp}): no further tokens are predicted. Use mtp=0."
        )
