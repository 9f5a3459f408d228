"""A stand-in for Transformer Engine 2.9, which a test makes the package ``transformer_engine``.

It has the names that megatron-core 0.16.1 to 0.19 use, computes in plain torch on the CPU, and notes each fp8 recipe.
"""

import dataclasses
import enum
import sys
from contextlib import contextmanager, nullcontext
from types import ModuleType
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import nn

__version__ = "2.9.0"
torch.cuda.current_device = lambda: torch.device("cpu")
seen: list = []  # the recipe of each fp8_autocast


class Linear(nn.Module):
    def __init__(
        self, in_features, out_features, *, sequence_parallel, fuse_wgrad_accumulation, tp_group, tp_size,
        get_rng_state_tracker, init_method, bias, return_bias, parallel_mode, params_dtype, device,
        rng_tracker_name=None,
    ):  # fmt: skip
        super().__init__()
        assert tp_size == 1, "the stub does not communicate"
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.return_bias, self.parallel_mode, self.save_original_input = return_bias, parallel_mode, False
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        init_method(self.weight)
        self.bias = torch.empty(0)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype, device=device))

    def forward(self, x, is_first_microbatch=None):
        out = F.linear(x, self.weight, self.bias if self.use_bias and not self.return_bias else None)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    def __init__(
        self, in_features, out_features, *, eps, normalization, return_layernorm_output, zero_centered_gamma, **rest
    ):
        super().__init__(in_features, out_features, **rest)
        assert not return_layernorm_output
        assert not zero_centered_gamma
        self.eps, self.normalization = eps, normalization
        as_weight = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, **as_weight))
        has_bias = normalization == "LayerNorm"
        self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **as_weight)) if has_bias else None

    def forward(self, x, is_first_microbatch=None):
        shape = (self.in_features,)
        if self.normalization == "LayerNorm":
            return super().forward(F.layer_norm(x, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps))
        return super().forward(F.rms_norm(x, shape, self.layer_norm_weight, self.eps))


class LayerNorm(nn.LayerNorm):
    def __init__(self, hidden_size=None, *, eps, params_dtype, device, normalized_shape=None, **_):
        super().__init__(hidden_size or normalized_shape, eps, dtype=params_dtype, device=device)


class RMSNorm(nn.RMSNorm):
    def __init__(self, hidden_size=None, *, eps, params_dtype, device, normalized_shape=None, **_):
        super().__init__(hidden_size or normalized_shape, eps, dtype=params_dtype, device=device)


class DotProductAttention(nn.Module):
    def __init__(self, num_attention_heads, kv_channels, attention_dropout, attn_mask_type, num_gqa_groups, **rest):
        super().__init__()
        assert attention_dropout == 0

    def forward(self, query, key, value, attention_mask, attn_mask_type):
        assert attn_mask_type == "causal"
        heads_first = [each.permute(1, 2, 0, 3) for each in (query, key, value)]  # from [s, b, heads, channels]
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class GroupedLinear(nn.Module):
    pass


class QuantizedTensor(torch.Tensor):
    pass


class CudaRNGStatesTracker:
    pass


class FP8GlobalStateManager:
    @classmethod
    def is_fp8_enabled(cls):
        return False


@contextmanager
def fp8_autocast(enabled=True, fp8_recipe=None, fp8_group=None):
    seen.append(fp8_recipe)
    yield


class Format(enum.Enum):
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"


def recipe(cls):
    """A dataclass that leaves names out which it does not have, as pydantic's do, which Transformer Engine has."""
    cls = dataclasses.dataclass(cls)
    make, known = cls.__init__, {field.name for field in dataclasses.fields(cls)}
    cls.__init__ = lambda self, **given: make(self, **{name: given[name] for name in given if name in known})
    return cls


@recipe
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    scaling_factor_compute_algo: object = None
    override_linear_precision: tuple = (False, False, False)
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


@recipe
class Float8CurrentScaling:
    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False


@recipe
class MXFP8BlockScaling:
    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False


@recipe
class Float8BlockScaling:
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False


@recipe
class NVFP4BlockScaling:
    fp4_format: str = "e2m1"


def _module(name, **content):
    module = sys.modules[f"{__name__}.{name}"] = ModuleType(f"{__name__}.{name}")
    vars(module).update(content)
    parent, _, last = module.__name__.rpartition(".")
    setattr(sys.modules[parent], last, module)


_module("common")
_module(
    "common.recipe", Format=Format, DelayedScaling=DelayedScaling, Float8CurrentScaling=Float8CurrentScaling,
    MXFP8BlockScaling=MXFP8BlockScaling, Float8BlockScaling=Float8BlockScaling, NVFP4BlockScaling=NVFP4BlockScaling,
)  # fmt: skip
_module(
    "pytorch", Linear=Linear, LayerNormLinear=LayerNormLinear, LayerNorm=LayerNorm, RMSNorm=RMSNorm,
    DotProductAttention=DotProductAttention, GroupedLinear=GroupedLinear, fp8_autocast=fp8_autocast, ops=MagicMock(),
)  # fmt: skip
_module(
    "pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=fp8_autocast, fp8_model_init=fp8_autocast
)
_module(
    "pytorch.distributed", CudaRNGStatesTracker=CudaRNGStatesTracker, activation_recompute_forward=nullcontext
)  # fmt: skip
_module("pytorch.tensor", QuantizedTensor=QuantizedTensor)
_module(
    "pytorch.router", fused_compute_score_for_moe_aux_loss=None, fused_moe_aux_loss=None,
    fused_topk_with_score_function=None,
)  # fmt: skip
