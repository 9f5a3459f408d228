"""What an estimate of memory has to know of a run: batch, precision, recomputation, kernels, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.distributed.layout import ContextComm
from lightning_megatron.models.kernels import Kernels
from lightning_megatron.models.lora.config import LoRA
from lightning_megatron.models.recompute import Recompute
from lightning_megatron.models.recompute import check as check_recompute
from lightning_megatron.training.optimizers.state_size import states_of

# Bytes of a weight, of its gradient, and of its main weight where that is a copy.
PRECISIONS = {"32-true": (4, 4, 0), "bf16-mixed": (2, 4, 4), "16-mixed": (2, 4, 4), "bf16-true": (2, 2, 4)}
Device = Literal["cuda", "cpu"]


@partial(answer_wrong_names, called="ParallelLayout.memory")
@dataclass(frozen=True, kw_only=True)
class Training:
    """What the estimate has to know of a run, beside its layout.

    Args:
        micro_batch_size: Rows of a micro-batch.
        num_microbatches: Micro-batches of a batch; None is enough of them to fill the pipeline.
        precision: As ``Trainer(precision=)`` has it.
        recompute: As ``MegatronStrategy(recompute=)`` has it.
        distributed_optimizer: Whether optimizer state and main weights are divided among the ranks with equal weights.
        kernels: Which implementations compute the layers and the loss.
        cp_comm: As ``MegatronStrategy(cp_comm=)`` has it.
        lengths: Tokens of a sequence; of a T5, of both sides. None are the longest that the configuration allows.
        optimizer: The optimizer, or what makes it of parameters, such as ``partial(LeanAdamW, on_host=True)``, a
            module's ``optimizer=``. None: ``optimizer_states`` says what it keeps.
        optimizer_states: fp32 numbers that the optimizer keeps for each weight: 2 of Adam, 1 of SGD with momentum.
        device: "cuda" or "cpu", whose kernels keep different tensors.
        lora: Low-rank updates that are trained in place of the weights. None: all weights are trained.

    Raises:
        ValueError: A value is none of these.
    """

    micro_batch_size: int = 1
    num_microbatches: int | None = None
    precision: str = "bf16-mixed"
    recompute: Recompute | None = None
    distributed_optimizer: bool = True
    kernels: Kernels | None = None
    cp_comm: ContextComm | None = None
    lengths: tuple[int, ...] | None = None
    optimizer: Any = None
    optimizer_states: float = 2
    device: Device = "cuda"
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        arguments = Arguments("ParallelLayout.memory")
        arguments.whole(micro_batch_size=self.micro_batch_size)
        arguments.whole(optional=True, num_microbatches=self.num_microbatches)
        arguments.one_of(tuple(PRECISIONS), precision=self.precision)
        arguments.one_of(("cuda", "cpu"), device=self.device)
        arguments.one_of((None, *get_args(ContextComm)), cp_comm=self.cp_comm)
        arguments.flag(distributed_optimizer=self.distributed_optimizer)
        arguments.kind(LoRA, "lightning_megatron.LoRA(...)", optional=True, lora=self.lora)
        check_recompute(self.recompute, of="ParallelLayout.memory")

    @property
    def states(self) -> float:
        """fp32 numbers that the optimizer keeps on the device for each weight."""
        return self.optimizer_states if self.optimizer is None else states_of(self.optimizer, self.device)

    @property
    def element(self) -> int:
        """Bytes of a number in the weights' type."""
        return PRECISIONS[self.precision][0]
