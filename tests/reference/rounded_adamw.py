"""The truth of moments in bf16: torch's AdamW, whose moments are rounded after each step."""

from typing import Any

import torch


class Rounded(torch.optim.AdamW):
    """AdamW whose moments are bf16 numbers, kept in fp32."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(state[name].bfloat16())
