"""DeepSeek-V2 and V2-Lite: a softmax over all experts, whose weights do not add up to 1."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families.deepseek import Deepseek

_IN_GROUPS, _ANY = "group_limited_greedy", "greedy"


class DeepseekV2(Deepseek):
    """Experts are chosen in the groups with the best single expert (V2), or anywhere (V2-Lite)."""

    model_type = "deepseek_v2"

    @override
    def read_router(self, fields: Fields) -> dict[str, Any]:
        fields.must_be("mlp_bias", False)
        fields("norm_topk_prob")  # transformers' class never does
        found = {"router": "softmax", "normalize_top_k": False, "balancing": "none"}
        groups = {"groups": fields("n_group"), "top_k_groups": fields("topk_group"), "group_scores": 1}
        return {**found, **(groups if fields.must_be("topk_method", _ANY, _IN_GROUPS) == _IN_GROUPS else {})}

    @override
    def write_router(self, experts: Any) -> dict[str, Any]:
        self._require(experts, router=("softmax",), normalize_top_k=(False,))
        if experts.groups is None:
            return {"topk_method": _ANY}
        self._require(experts, group_scores=(1,))
        return {"topk_method": _IN_GROUPS, "n_group": experts.groups, "topk_group": experts.top_k_groups}
