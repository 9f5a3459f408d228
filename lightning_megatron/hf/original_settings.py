"""Keeps what a model of transformers came with beside its weights, so that an export writes it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Origin:
    """Settings that a pretrained model had; kept in a module's hyperparameters, and so in its checkpoints.

    Args:
        config: transformers' configuration; None: the model was not pretrained.
        generation: The model's ``generation_config.json``; None: it had none.
        dtypes: Type in which each tensor was stored, by transformers' name of it.
    """

    config: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    dtypes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, hyperparameters: Mapping[str, Any]) -> Origin:
        """Read the settings from a module's hyperparameters."""
        known = {name: hyperparameters.get(f"pretrained_{name}") for name in ("config", "generation")}
        return cls(**known, dtypes=dict(hyperparameters.get("pretrained_dtypes") or {}))

    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters from which ``of`` reads the settings."""
        return {f"pretrained_{name}": value for name, value in vars(self).items()}

    def dtype_of(self, name: str, own: torch.dtype) -> torch.dtype:
        """The type in which a tensor was stored; of a new one, that of most others; ``own`` where nothing is known."""
        usual = Counter(self.dtypes.values()).most_common(1)
        stored = self.dtypes.get(name, usual[0][0] if usual else "")
        found = getattr(torch, stored, None)
        return found if isinstance(found, torch.dtype) and found.is_floating_point else own
