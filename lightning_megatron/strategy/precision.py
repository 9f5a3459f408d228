"""``MegatronPrecision``: what ``Trainer(precision=)`` means for weights, gradients and the loss scale."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_megatron.distributed import lightning_private
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.distributed.other_names import VALUE_NAMES
from lightning_megatron.models.megatron_module import MegatronModule
from lightning_megatron.strategy.fp8 import fp8_fields
from lightning_megatron.training.nonfinite import NonFiniteLossError
from lightning_megatron.training.optimizer import ShardedOptimizer

# The type of the weights, and whether gradients are kept and reduced in fp32.
_KINDS: dict[str, tuple[torch.dtype, bool]] = {
    "32-true": (torch.float32, True),
    "bf16-mixed": (torch.bfloat16, True),
    "bf16-true": (torch.bfloat16, False),
    "16-mixed": (torch.float16, True),
    "transformer-engine": (torch.bfloat16, True),
    "transformer-engine-float16": (torch.float16, True),
}
_DOUBLE = "64-true"  # for plain modules on one rank, which Lightning's own loop trains
_INITIAL_LOSS_SCALE = 65536.0  # the same as torch's GradScaler


@answer_wrong_names
class MegatronPrecision(Precision):
    """Megatron's mixed precision: low-precision weights, and fp32 main weights in the optimizer.

    "bf16-mixed" and "16-mixed" keep gradients in fp32; "bf16-true" keeps and reduces them in bf16 too.
    "transformer-engine" is "bf16-mixed" whose layers multiply in fp8. A plain LightningModule trains as it does
    elsewhere in Lightning: fp32 weights under autocast for the mixed ones.

    Args:
        precision: "32-true", "bf16-mixed", "bf16-true", "16-mixed" (with a dynamic loss scale), "transformer-engine",
            "transformer-engine-float16" (as "16-mixed" in fp8), or "64-true", which is for plain modules on one rank
            only.
        initial_loss_scale: The loss scale that the fp16 ones start from; None is 65536. Other precisions refuse it.
        recipe: How fp8 is scaled: an object of ``transformer_engine.common.recipe``. None is ``DelayedScaling()``.
    """

    def __init__(self, precision: str = "32-true", initial_loss_scale: float | None = None, recipe: Any = None) -> None:
        if precision not in (*_KINDS, _DOUBLE):
            ours = VALUE_NAMES["precision"].get(str(precision))
            use = f"Use {ours!r}" if ours else f"Use one of {', '.join(_KINDS)}"
            raise MisconfigurationException(f"MegatronStrategy does not train with precision={precision!r}. {use}.")
        arguments = Arguments("MegatronPrecision", MisconfigurationException)
        arguments.number(above=0, optional=True, initial_loss_scale=initial_loss_scale)
        self.precision = precision  # type: ignore[assignment]
        self.compute_dtype, self.grads_in_fp32 = _KINDS.get(precision, (torch.float64, False))
        if initial_loss_scale is not None and not self.scales_loss:
            raise MisconfigurationException(
                f"MegatronPrecision({precision!r}, initial_loss_scale={initial_loss_scale}): only '16-mixed' and"
                " 'transformer-engine-float16' scale the loss. Leave initial_loss_scale out."
            )
        self.initial_loss_scale = initial_loss_scale or _INITIAL_LOSS_SCALE if self.scales_loss else None
        in_fp8 = precision.startswith("transformer-engine")
        if recipe is not None and not in_fp8:
            raise MisconfigurationException(
                f"MegatronPrecision({precision!r}, recipe={type(recipe).__name__}): only 'transformer-engine'"
                " multiplies in fp8. Use it, or leave recipe out."
            )
        self.fp8 = fp8_fields(recipe) if in_fp8 else {}  # fields of megatron-core's TransformerConfig
        self.after_backward: Callable[[], None] | None = None  # set for runs in which a schedule runs backward
        self.check_norm = False  # set by the strategy: whether gradients that are not finite end the run
        self.plain_module = False  # set by the strategy: layers of plain torch do not cast their inputs by themselves

    @property
    def params_dtype(self) -> torch.dtype:
        """The type of the weights that layers compute with."""
        return torch.float32 if self._autocasts else self.compute_dtype

    @property
    def scales_loss(self) -> bool:
        """Whether there is a dynamic loss scale."""
        return self.compute_dtype == torch.float16

    def check_module(self, module: torch.nn.Module, single_rank: bool) -> None:
        """Refuse "64-true" for all but plain modules on a single rank, and fp8 for layers that ignore it.

        Raises:
            MisconfigurationException: Says what the module can have.
        """
        layers = getattr(getattr(module, "config", None), "layers", None)
        if self.fp8 and (layers == "torch" or not isinstance(module, MegatronModule)):
            raise MisconfigurationException(
                f"Trainer(precision={self.precision!r}) multiplies in fp8, which only Transformer Engine's layers do;"
                f" {type(module).__name__} has none here. Use a GPTModule with GPTConfig(layers='transformer_engine'),"
                " or precision='bf16-mixed'."
            )
        if self.compute_dtype == torch.float64 and not single_rank:
            raise MisconfigurationException(
                f"MegatronStrategy does not train {type(module).__name__} with precision='64-true': megatron-core has"
                " no such weights, and only a plain LightningModule on one rank is trained without it. Use one of"
                f" {', '.join(_KINDS)}."
            )

    @property
    def _autocasts(self) -> bool:
        return self.plain_module and str(self.precision).endswith("-mixed")

    @classmethod
    def from_plugin(cls, plugin: Precision) -> MegatronPrecision:
        """Replace the plugin that ``Trainer(precision=)`` made; Megatron has its own autocast and loss scale."""
        if isinstance(plugin, cls):
            return plugin
        if type(plugin) in (Precision, MixedPrecision, HalfPrecision, DoublePrecision):
            return cls(str(plugin.precision))
        if isinstance(plugin, TransformerEnginePrecision):
            return cls._from_transformer_engine(plugin)
        raise MisconfigurationException(
            f"MegatronStrategy does not train with precision={plugin.precision!r} ({type(plugin).__name__})."
            f" Use Trainer(precision=) with one of {', '.join(_KINDS)}."
        )

    @classmethod
    def _from_transformer_engine(cls, plugin: TransformerEnginePrecision) -> MegatronPrecision:
        if plugin.replace_layers or plugin.fallback_compute_dtype != plugin.weights_dtype:
            raise MisconfigurationException(
                f"MegatronStrategy: TransformerEnginePrecision(replace_layers={plugin.replace_layers},"
                f" fallback_compute_dtype={plugin.fallback_compute_dtype}) changes layers that megatron-core builds."
                " Leave both out, and use GPTConfig(layers='transformer_engine')."
            )
        of_fp16 = "-float16" if plugin.weights_dtype == torch.float16 else ""
        return cls(f"transformer-engine{of_fp16}", recipe=plugin.recipe)

    @override
    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        return module if self.params_dtype == torch.float32 else module.to(self.params_dtype)

    @override
    def convert_input(self, data: Any) -> Any:
        """Convert the floats of a plain module's batch to the type of its weights; loss masks of others stay exact."""
        if not self.plain_module or self.params_dtype == torch.float32:
            return data
        return lightning_private.convert_floats(data, self.params_dtype)

    def step_context(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context of each micro-batch's forward pass."""
        if self._autocasts:
            return torch.autocast(device.type, self.compute_dtype)
        if self.plain_module and self.params_dtype != torch.float32:
            return lightning_private.DefaultDtype(self.params_dtype)  # also for tensors that the step makes
        return nullcontext()

    @override
    def backward(self, tensor: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass; where a schedule has run it already, call only ``after_backward``."""
        if self.after_backward is None:
            super().backward(tensor, model, optimizer, *args, **kwargs)
        else:
            self.after_backward()

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip like Lightning, for a module that its own loop trains, and look at the norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.main_params(optimizer), clip_val)
        if self.check_norm and not bool(torch.isfinite(norm)):
            raise NonFiniteLossError(
                f"The gradients' norm is {norm.item()}; the weights are as the last step left them. Lower the learning"
                " rate, look at the batch, or leave such steps out: MegatronStrategy(on_nonfinite='skip')."
            )

    @override
    def clip_gradients(
        self,
        optimizer: Any,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Leave the norm to the optimizer's step, which takes it over all model-parallel ranks."""
        if not isinstance(optimizer, ShardedOptimizer):  # Lightning's own loop trains the module
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
            return
        if clip_val and gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            raise MisconfigurationException(
                f"MegatronStrategy clips by norm only; gradient_clip_algorithm='value' (gradient_clip_val={clip_val})"
                " would clip each rank's gradients before they are summed over the replicas. Use 'norm'."
            )
        optimizer.clip_norm = float(clip_val or 0.0)
