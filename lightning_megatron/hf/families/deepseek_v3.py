"""DeepSeek-V3 and R1: sigmoid scores, and biases that help to choose; what predicts further tokens is left out."""

from __future__ import annotations

import re
from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.deepseek import Deepseek


class DeepseekV3(Deepseek):
    """Experts are chosen in the groups with the best two. The biases stay as they are unless ``bias_rate`` is given."""

    model_type = "deepseek_v3"

    @override
    def read_interleave(self, fields: Fields) -> bool:
        fields("num_mtp_layers")  # see ``left_out``
        return bool(fields("rope_interleave"))

    @override
    def write_interleave(self, latent: Any) -> dict[str, Any]:
        return {"rope_interleave": latent.rope_interleave}

    @override
    def read_router(self, fields: Fields) -> dict[str, Any]:
        groups, best = fields("n_group"), fields("topk_group")
        some = {} if groups == 1 else {"groups": groups, "top_k_groups": best, "group_scores": 2}
        normalized = fields.must_be("norm_topk_prob", True)
        return {
            "router": "sigmoid", "normalize_top_k": normalized, "balancing": "bias", "bias_rate": 0.0, **some,
        }  # fmt: skip

    @override
    def write_router(self, experts: Any) -> dict[str, Any]:
        self._require(experts, router=("sigmoid",), normalize_top_k=(True,), balancing=("bias",))
        if experts.groups is None:
            return {"norm_topk_prob": True, "n_group": 1, "topk_group": 1}
        self._require(experts, group_scores=(2,))
        return {"norm_topk_prob": True, "n_group": experts.groups, "topk_group": experts.top_k_groups}

    @override
    def left_out(self, name: str, config: Any) -> str:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return "the layers that predict further tokens (MTP)" if layer and int(layer[1]) >= config.num_layers else ""
