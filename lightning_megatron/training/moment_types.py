"""The types that an optimizer's moments can have, and how long an average may be in each."""

from __future__ import annotations

from typing import Literal

MomentType = Literal["float32", "bfloat16"]
# An average in bf16, which has 8 bits, stands still where a step changes it by less than 1/256 of itself.
LARGEST_BETA_IN_BF16 = 0.98
