"""``LRSchedule``: Megatron's schedule of the learning rate and the weight decay."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from torch.optim import Optimizer

    from lightning_megatron.training.lr_scheduler import MegatronLRScheduler

Style = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WSDDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
WeightDecayStyle = Literal["constant", "linear", "cosine"]
Unit = Literal["steps", "samples"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    "wsd_decay_style": ("exponential", "linear", "cosine", "minus_sqrt"),
    "weight_decay_style": ("constant", "linear", "cosine"),
    "unit": ("steps", "samples"),
}


@answer_wrong_names
@dataclass(frozen=True)
class LRSchedule:
    """Megatron's schedule: a linear warm-up to the optimizer's learning rate, then a decay, step by step.

    The values are those of ``megatron.core.optimizer_param_scheduler.OptimizerParamScheduler``. The peak is the ``lr``
    of the optimizer; parameter groups with other rates keep their ratio to it, also in ``min_lr``. All lengths are
    optimizer steps, or samples with ``unit="samples"``, and count from the start of training.

    Args:
        style: Shape of the decay after the warm-up. "inverse-square-root" follows 1/√step; "WSD" (warm-up, stable,
            decay) stays at the peak until ``wsd_decay_steps`` before the end; "constant" stays at the peak.
        warmup_steps: Length of the warm-up.
        warmup_fraction: Length of the warm-up as a fraction of ``decay_steps``, in place of ``warmup_steps``.
        decay_steps: The end of the decay, warm-up included; ``min_lr`` holds from there on. None takes the
            length of the run, which is the Trainer's ``max_steps``, or without it ``estimated_stepping_batches``.
        min_lr: Learning rate at the end of the decay.
        init_lr: Learning rate at the start of the warm-up, for every parameter group alike, as in Megatron.
        unit: "steps", or "samples" of the global batch; each step counts data-parallel size × ``batch_size`` of the
            loader × ``accumulate_grad_batches``, or what its ``RampUpBatches`` give.
        weight_decay_style: "constant" leaves the optimizer's weight decay, or sets it where start and end are given
            (and equal). "linear" and "cosine" raise it from start to end; groups without weight decay stay without.
        start_weight_decay: First weight decay.
        end_weight_decay: Last weight decay, not below the first.
        weight_decay_steps: The point at which the last weight decay is reached; None takes ``decay_steps``.
        wsd_decay_steps: Length of WSD's decay.
        wsd_decay_style: Shape of WSD's decay; None takes "exponential".

    Raises:
        ValueError: An unknown choice, or arguments that contradict each other.
    """

    style: Style = "linear"
    _: KW_ONLY
    warmup_steps: int = 0
    warmup_fraction: float | None = None
    decay_steps: int | None = None
    min_lr: float = 0.0
    init_lr: float = 0.0
    unit: Unit = "steps"
    weight_decay_style: WeightDecayStyle = "constant"
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_steps: int | None = None
    wsd_decay_steps: int | None = None
    wsd_decay_style: WSDDecayStyle | None = None

    def __post_init__(self) -> None:
        """Refuse choices that do not exist and arguments that contradict each other."""
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known and not (name == "wsd_decay_style" and value is None):
                raise _refusal(f"{name}={value!r} is unknown. Use one of {', '.join(map(repr, known))}.")
        self._check_rates()
        self._check_lengths()
        self._check_weight_decay()
        self._check_wsd()

    def build(
        self, optimizer: Optimizer, trainer: pl.Trainer | None = None, *, samples_per_step: int | None = None
    ) -> MegatronLRScheduler:
        """Make the torch scheduler of this schedule; return it to Lightning with ``"interval": "step"``.

        Args:
            optimizer: The optimizer whose groups it sets; their ``lr`` is the peak.
            trainer: The Trainer, asked for the length of the run (``decay_steps=None``) and the global batch
                (``unit="samples"``); not needed without these.
            samples_per_step: Samples of the global batch, where the Trainer's loader does not tell its ``batch_size``.

        Raises:
            ValueError: The rates contradict the optimizer's, or a Trainer is needed and missing.
            MisconfigurationException: The length of the Trainer's run is not known.
        """
        from lightning_megatron.training.lr_scheduler import MegatronLRScheduler

        return MegatronLRScheduler(optimizer, self, trainer, samples_per_step)

    @property
    def raises_weight_decay(self) -> bool:
        """Whether the weight decay changes over the steps."""
        return self.weight_decay_style != "constant"

    @property
    def needs_horizon(self) -> bool:
        """Whether ``decay_steps`` matters."""
        raises_until_the_end = self.raises_weight_decay and self.weight_decay_steps is None
        return self.style != "constant" or bool(self.warmup_fraction) or raises_until_the_end

    def megatron_scheduler(self, max_lr: float, decay_steps: int) -> OptimizerParamScheduler:
        """Make megatron-core's own scheduler of this schedule, over no parameters: only its formulas are used.

        Args:
            max_lr: Learning rate at the peak.
            decay_steps: The end of the decay.
        """
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        fraction = self.warmup_fraction
        return OptimizerParamScheduler(
            SimpleNamespace(param_groups=[]),
            init_lr=self.init_lr,
            max_lr=max_lr,
            min_lr=self.min_lr,
            lr_warmup_steps=self.warmup_steps if fraction is None else fraction * decay_steps,
            lr_decay_steps=decay_steps,
            lr_decay_style=self.style,
            start_wd=self.start_weight_decay or 0.0,
            end_wd=self.end_weight_decay or 0.0,
            wd_incr_steps=self.weight_decay_steps or decay_steps,
            wd_incr_style=self.weight_decay_style,
            wsd_decay_steps=self.wsd_decay_steps,
            lr_wsd_decay_style=self.wsd_decay_style or "exponential",
        )

    def _check_lengths(self) -> None:
        for name in ("warmup_steps", "decay_steps", "weight_decay_steps", "wsd_decay_steps"):
            value, least = getattr(self, name), 0 if name == "warmup_steps" else 1
            if value is None and name != "warmup_steps":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _refusal(f"{name}={value!r} is not a whole number of {self.unit} from {least}.")
        if self.warmup_fraction is not None:
            if self.warmup_steps:
                raise _refusal(
                    f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction} say the same thing"
                    " twice. Give one of them."
                )
            if not 0 <= self.warmup_fraction < 1:
                raise _refusal(
                    f"warmup_fraction={self.warmup_fraction} is a fraction of decay_steps: use 0 up to, not with, 1."
                )
        if self.decay_steps is not None and self.warmup_steps >= self.decay_steps:
            raise _refusal(
                f"warmup_steps={self.warmup_steps} is not below decay_steps={self.decay_steps}, which includes the"
                f" warm-up. Use decay_steps={self.warmup_steps + 1} or more."
            )

    def _check_rates(self) -> None:
        arguments = Arguments("LRSchedule")
        arguments.number(min_lr=self.min_lr, init_lr=self.init_lr)
        optional = ("warmup_fraction", "start_weight_decay", "end_weight_decay")
        arguments.number(optional=True, **{name: getattr(self, name) for name in optional})
        for name in ("min_lr", "init_lr"):
            if getattr(self, name) < 0:
                raise _refusal(f"{name}={getattr(self, name)} is negative. Use 0 or more.")
        if self.init_lr and not self.warmup_steps and not self.warmup_fraction:
            raise _refusal(
                f"init_lr={self.init_lr} is where the warm-up begins, but there is no warm-up. Give warmup_steps or"
                " warmup_fraction, or leave init_lr out."
            )

    def _check_weight_decay(self) -> None:
        start, end = self.start_weight_decay, self.end_weight_decay
        seen = f"start_weight_decay={start}, end_weight_decay={end}"
        if (start is None) != (end is None) or (self.raises_weight_decay and start is None):
            raise _refusal(f"{seen} with weight_decay_style={self.weight_decay_style!r}: give both start and end.")
        if start is not None and end is not None:
            if not self.raises_weight_decay and start != end:
                raise _refusal(
                    f"{seen} with weight_decay_style='constant', which keeps one value. Use 'linear' or 'cosine', or"
                    " leave both out and set the optimizer's weight_decay."
                )
            if not 0 <= start <= end:
                raise _refusal(f"{seen}: Megatron raises the weight decay, from 0 or more. Use start <= end.")
        if self.weight_decay_steps is not None and not self.raises_weight_decay:
            raise _refusal(
                f"weight_decay_steps={self.weight_decay_steps} with weight_decay_style='constant', which keeps one"
                " value. Use 'linear' or 'cosine', or leave it out."
            )

    def _check_wsd(self) -> None:
        length = self.wsd_decay_steps
        if self.style != "WSD":
            if length is not None or self.wsd_decay_style is not None:
                raise _refusal(
                    f"wsd_decay_steps={length}, wsd_decay_style={self.wsd_decay_style!r} with style={self.style!r}:"
                    " they belong to style='WSD'. Leave them out, or use style='WSD'."
                )
            return
        if length is None:
            raise _refusal("style='WSD' decays at its end only. Give wsd_decay_steps, the length of that decay.")
        if self.decay_steps is not None and self.warmup_steps + length > self.decay_steps:
            raise _refusal(
                f"warmup_steps={self.warmup_steps} and wsd_decay_steps={length} do not fit into"
                f" decay_steps={self.decay_steps}. Use decay_steps={self.warmup_steps + length} or more."
            )


def _refusal(text: str) -> ValueError:
    return ValueError(f"LRSchedule: {text}")
