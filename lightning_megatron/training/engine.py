"""Runs Megatron's pipeline schedules over the micro-batches of a batch, and finalises the gradients.

Knows neither Lightning nor any task: a ``step`` function runs one micro-batch through one model chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func

from lightning_megatron.distributed import collectives, process_groups, shared_weights
from lightning_megatron.distributed.device import model_rng
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.training.batch_rows import join_rows
from lightning_megatron.training.microbatches import Cut, slices
from lightning_megatron.training.timers import Timers

# Runs (micro-batch, its share of the batch's rows, chunk number). On the last stage it returns a loss, which is a sum
# and its weight or a mean, or a dict with one under "loss"; in an evaluation, anything. What it returns before the last
# stage is passed on where it is of the hidden states' shape; else the chunk's own output is.
Step = Callable[[Any, float, int], Any]


_NO_LOSS = (
    "training_step returned {}. MegatronStrategy skips no batch: replicas and stages wait for one another. Return a"
    " loss, or a dict with one under 'loss'; zero (loss * 0.0) where a batch shall count for nothing."
)
_TINY = torch.finfo(torch.float64).tiny  # in place of no weight at all


class NonFiniteLossError(RuntimeError):
    """A loss that is NaN or infinite, raised on every rank."""


@dataclass(frozen=True)
class Outcome:
    """What one batch gave, the same on every rank.

    Args:
        loss: Mean over the global batch, a float32 scalar.
        weight: What it was weighed by: tokens over all data-parallel replicas, or for means the number of replicas.
        has_logged_values: Whether any rank has logged a value in this batch, so that all ranks gather what was logged.
        has_loss: Whether the steps returned losses at all.
        returned: What they returned beside them, micro-batches joined by rows; None for nothing.
    """

    loss: torch.Tensor
    weight: float
    has_logged_values: bool
    has_loss: bool = True
    returned: Any = None

    @property
    def hook_outputs(self) -> Any:
        """What the hooks at a batch's end are told: as one step on the whole batch would have returned it."""
        if not self.has_loss:
            return self.returned
        return {**self.returned, "loss": self.loss} if isinstance(self.returned, dict) else self.loss


class Engine:
    """The model chunks of one rank under megatron-core's schedules.

    Args:
        layout: The parallel sizes.
        chunks: The model chunks, one per virtual stage.
        config: megatron-core's configuration that the chunks share.
        ddp: Settings of megatron-core's data parallelism; None for an engine that only evaluates.
        by_token: Whether losses are weighed by their tokens, else every micro-batch by its rows.
        device: Where the model is.
        rng_context: Where the model's random numbers come from: a context around each schedule.
    """

    def __init__(
        self,
        layout: ParallelLayout,
        chunks: list[torch.nn.Module],
        config: ModelParallelConfig,
        ddp: DistributedDataParallelConfig | None,
        by_token: bool,
        device: torch.device,
        rng_context: Callable[[], AbstractContextManager[Any]] = model_rng,
    ) -> None:
        self.layout = layout
        self.config = config
        self.by_token = by_token
        self.device = device
        self._rng_context = rng_context
        self.trains = ddp is not None
        for chunk in chunks:
            process_groups.rebind(chunk)  # an earlier run's may have been ended
        self.chunks: list[Any] = [_wrap(c, config, ddp, i) for i, c in enumerate(chunks)] if ddp else list(chunks)
        for number, chunk in enumerate(self.chunks):
            chunk.__dict__["chunk_number"] = number
        self._overlaps = bool(ddp and ddp.overlap_grad_reduce)
        # Whether a rank's parameters are parts of the model, of other sizes than its neighbours'.
        self.is_model_sharded = layout.pp > 1 or any(
            getattr(p, "tensor_model_parallel", False) for p in chunks[0].parameters()
        )
        self._buffer_views = [(p, p.data, p.requires_grad) for chunk in self.chunks for p in chunk.parameters()]
        self.has_logged_values: Callable[[], bool] = lambda: False  # asked after each batch, answered in its outcome
        self._window_weight = 0.0
        self.has_gradients = False  # of batches since the last step
        self._buffers = [pair for chunk in chunks for pair in _kept_buffers(chunk)] if layout.dp > 1 else []
        self.share_buffers()
        self.timers: Timers | None = None
        self.local_loss = torch.zeros((), device=device)  # the last batch's sum on this rank, 0 before the last stage

    def zero_grad(self) -> None:
        """Forget the gradients, and what the accumulation window has weighed so far."""
        self._window_weight = 0.0
        self.has_gradients = False
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def set_timers(self, timers: Timers | None) -> None:
        """Have megatron-core time what it does; None stops that."""
        self.timers = timers
        for config in {id(chunk.config): chunk.config for chunk in self.chunks}.values():
            config.timers = timers

    def remove_hooks(self) -> None:
        """Take the hooks off the model: another engine, or another strategy, may train it next."""
        for chunk in self.chunks if self.trains else ():
            if chunk.remove_forward_pre_hook_handles:
                chunk.disable_forward_pre_hook(param_sync=False)
            chunk.param_to_bucket_group = {}
            for node in chunk.grad_accs:
                _take_hooks_off(node)
            chunk.grad_accs.clear()

    def restore_moved_weights(self) -> bool:
        """Put weights back into megatron-core's buffers that ``parameter.data = ...`` took out; whether any was."""
        moved = [
            (p, home) for p, home, _ in self._buffer_views if p.data_ptr() != home.data_ptr() or p.dtype != home.dtype
        ]
        for parameter, home in moved:
            home.copy_(parameter.data)
            parameter.data = home
        return bool(moved)

    def _check_trained(self) -> None:
        """Refuse a ``requires_grad`` that has changed since the gradients' buffers were laid out."""
        if any(parameter.requires_grad != trained for parameter, _, trained in self._buffer_views):
            raise RuntimeError(
                "requires_grad of a parameter has changed in the middle of a run, and megatron-core's gradient buffers"
                " are laid out at its start. Freeze and unfreeze before fit, and call fit again for the next phase."
            )

    def share_buffers(self) -> None:
        """Give every replica the first one's batch norms' means and their like, which differ after a training step."""
        collectives.broadcast_from_first_replica([getattr(module, name) for module, name in self._buffers])

    def finish_param_gather(self) -> None:
        """Bring weights up to date whose gathering ``overlap_param_gather`` puts off to the next forward pass."""
        if self.trains and self.chunks[0].ddp_config.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def train(self, batch: Any, cut: Cut, length: int, step: Step, *, window: int, last_of_window: bool) -> Outcome:
        """Forward and backward over one batch; gradients are finished when it is the last of its window.

        Args:
            batch: One data-parallel rank's batch.
            cut: Its micro-batches.
            length: Sequence length of the hidden states between stages.
            step: Runs one micro-batch through one chunk.
            window: Batches accumulated into one optimizer step.
            last_of_window: Whether the optimizer steps after this one.

        Returns:
            The loss of the global batch.
        """
        config = self.config
        if not self.has_gradients:
            self.share_buffers()
            self._check_trained()
            self.has_gradients = True
        with ExitStack() as stack:
            config.finalize_model_grads_func = None
            config.no_sync_func = None
            if last_of_window:
                config.finalize_model_grads_func = partial(self._finalize, window)
                if self._overlaps:
                    no_sync = [chunk.no_sync for chunk in self.chunks]
                    config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            elif self._overlaps:
                for chunk in self.chunks:
                    stack.enter_context(chunk.no_sync())
            records = self._run(batch, cut, length, step, forward_only=False)
        return self._outcome(records, cut)

    def finish_window(self, window: int) -> None:
        """Finish the gradients of a window whose last batch was skipped."""
        self._finalize(window, self.chunks, None)

    def evaluate(self, batch: Any, cut: Cut, length: int, step: Step) -> Outcome:
        """The loss of one batch, forward only."""
        return self._outcome(self._run(batch, cut, length, step, forward_only=True), cut)

    def predict(self, batch: Any, cut: Cut, length: int, step: Step) -> Any:
        """The last stage's outputs, rows joined in order, on every stage."""
        outputs = self._run(batch, cut, length, step, forward_only=True, collect=True)
        joined = join_rows(outputs[: len(cut.sizes)], list(cut.sizes)) if outputs else None
        return self._from_last_stage(joined)

    def _run(
        self, batch: Any, cut: Cut, length: int, step: Step, *, forward_only: bool, collect: bool = False
    ) -> list[Any]:
        """Run the schedule; what the last stage recorded per micro-batch, nothing on the others."""
        records: list[Any] = []

        def forward_step(micro_batches: Iterator[tuple[Any, float]], model: torch.nn.Module) -> tuple[Any, Any]:
            micro_batch, share = next(micro_batches)
            number = model.__dict__["chunk_number"]
            with _outputs_of(model) as given:
                output = step(micro_batch, share, number)
            return _passed_on(output, given, self.device), partial(finish, output, share)

        def finish(output: Any, share: float, _: torch.Tensor, non_loss_data: bool = False) -> Any:
            if non_loss_data:
                records.append(output)
                return output
            loss, extra = _loss_of(output, may_be_rows=forward_only and 1 in cut.sizes)
            if loss is None and not forward_only:
                raise TypeError(_NO_LOSS.format("None" if output is None else f"no loss but {output!r:.200}"))
            total, weight = self._weigh(loss, share)
            extra = apply_to_collection(extra, torch.Tensor, torch.Tensor.detach, allow_frozen=True)
            records.append((total.detach(), weight, loss is not None, extra))
            if not forward_only:
                self._window_weight += float(weight)
            return total, torch.zeros((), dtype=torch.int, device=total.device), {}

        iterators = [slices(batch, cut) for _ in self.chunks]
        several = len(self.chunks) > 1
        with self._rng_context():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if several else iterators[0],
                model=self.chunks if several else self.chunks[0],
                num_microbatches=len(cut.sizes) + cut.ghosts,
                seq_length=length,
                micro_batch_size=cut.sizes[0],
                forward_only=forward_only,
                collect_non_loss_data=collect,
            )
        return records

    def _weigh(self, loss: Any, share: float) -> tuple[torch.Tensor, Any]:
        """A micro-batch's loss as a weighted sum and its weight; a ghost's are nothing, as are those of no loss."""
        if loss is None:
            return torch.zeros((), device=self.device), 0.0
        if isinstance(loss, tuple):
            total, tokens = loss
            if self.by_token:
                return (total, tokens) if share else (total * 0.0, 0.0)
            return total / tokens.clamp(min=1) * share, share
        return loss.reshape(()) * share, share

    def _finalize(self, window: int, model: Any, _: Any, pg_collection: Any = None, **__: Any) -> None:
        """Reduce the gradients and divide by the weight of the whole window, over all replicas.

        By tokens, that is what was counted. Means are divided by the full window, as Lightning does it.
        """
        weight = self._window_weight if self.by_token else float(window)
        finalize_model_grads(model, torch.tensor(weight, device=self.device), pg_collection=pg_collection)
        shared_weights.all_reduce_gradients(model)

    def _outcome(self, records: list[Any], cut: Cut) -> Outcome:
        """The mean loss of the global batch, given to every rank, and what else this replica's steps returned."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        total = sum((r[0].double() for r in records), zero)
        weight = sum((torch.as_tensor(r[1], device=self.device).double() for r in records), zero)
        self.local_loss = total
        extra = _joined([r[3] for r in records[: len(cut.sizes)]], list(cut.sizes))
        flags = (self.has_logged_values(), any(r[2] for r in records), extra is not None)
        summed = torch.stack([total, weight, *(torch.full_like(total, flag) for flag in flags)])
        for group in (
            process_groups.data_parallel(),
            process_groups.pipeline(),
        ):  # stages before the last have no records: zeros
            if group.size() > 1:
                dist.all_reduce(summed, group=group)
        total, weight, notes, losses, extras = summed.tolist()
        loss = torch.tensor(total / max(weight, _TINY), dtype=torch.float32, device=self.device)
        return Outcome(loss, weight, notes > 0, losses > 0, self._from_last_stage(extra) if extras else None)

    def _from_last_stage(self, value: Any) -> Any:
        """What the last stage has, on every stage, and on the device of each."""
        if self.layout.pp == 1:
            return value
        if self.device.type == "cpu":
            return collectives.broadcast_object_from_last_stage(value)
        host = apply_to_collection(value, torch.Tensor, torch.Tensor.cpu, allow_frozen=True)
        host = collectives.broadcast_object_from_last_stage(host)
        return apply_to_collection(host, torch.Tensor, lambda x: x.to(self.device), allow_frozen=True)


def _wrap(
    chunk: torch.nn.Module, config: ModelParallelConfig, ddp: DistributedDataParallelConfig, number: int
) -> DistributedDataParallel:
    """The chunk with gradient buffers and their hooks, which ``Engine.remove_hooks`` takes off again."""
    wrapped = DistributedDataParallel(config, replace(ddp), chunk, disable_bucketing=number > 0)
    wrapped.broadcast_params()
    _equalise_replicated(chunk)
    return wrapped


def _take_hooks_off(node: Any) -> None:
    """Remove megatron-core's hooks from an autograd node, which the optimizer's shards of the weights hold on to.

    The hooks hold the model and with it the optimizer: a ring through autograd, which Python's collector does not see.
    """
    handle = node.register_hook(lambda *_: None)  # the way to megatron-core's, which keeps no handles (0.16.1)
    hooks = handle.hooks_dict_ref()
    handle.remove()
    for key in [key for key, hook in hooks.items() if hook.__module__ == DistributedDataParallel.__module__]:
        del hooks[key]


def _kept_buffers(chunk: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """What layers keep beside their weights and checkpoints save, such as a batch norm's running mean."""
    named = [(module, name) for module in chunk.modules() for name, b in module._buffers.items() if b is not None]
    return [(module, name) for module, name in named if name not in module._non_persistent_buffers_set]


def _equalise_replicated(chunk: torch.nn.Module) -> None:
    """Start weights that tensor-parallel ranks do not share out from the first rank's values."""
    group = process_groups.tensor_parallel()
    for parameter in chunk.parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            dist.broadcast(parameter.data, src=dist.get_global_rank(group, 0), group=group)


@contextmanager
def _outputs_of(model: torch.nn.Module) -> Iterator[list[Any]]:
    """What a chunk before the last stage gives while the step runs it; an empty list for one that ends the model."""
    chunk: Any = model.module if isinstance(model, DistributedDataParallel) else model
    given: list[Any] = []
    if getattr(chunk, "post_process", True):
        yield given
        return
    handle = chunk.register_forward_hook(lambda _, __, output: given.append(output))
    try:
        yield given
    finally:
        handle.remove()


def _passed_on(output: Any, given: list[Any], device: torch.device) -> torch.Tensor:
    """The tensor that the schedule passes on: hidden states; on the last stage one that nobody reads."""
    tensor = output[0] if isinstance(output, tuple) and output else output
    if isinstance(tensor, torch.Tensor) and (not given or tensor.shape == given[-1].shape):
        return tensor
    return given[-1] if given else torch.zeros((), device=device)


def _loss_of(output: Any, may_be_rows: bool) -> tuple[Any, Any]:
    """What a step on the last stage returned, as its loss and the rest, each None where there is none.

    Args:
        output: Of the step.
        may_be_rows: Whether a tensor of shape [1] may be the one row of a micro-batch, so that only scalars are losses.
    """
    if isinstance(output, Mapping) and "loss" in output:
        loss, rest = output["loss"], {name: value for name, value in output.items() if name != "loss"}
        return loss, rest or None

    def is_number(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.numel() == 1 and not (may_be_rows and value.dim())

    if is_number(output):
        return output, None
    is_sum = isinstance(output, tuple) and len(output) == 2 and not hasattr(output, "_fields")
    if is_sum and is_number(output[0]) and (isinstance(output[1], int | float) or is_number(output[1])):
        return output, None
    return None, output


def _joined(extras: list[Any], sizes: list[int]) -> Any:
    """What the steps of the micro-batches returned beside losses, as one."""
    if all(extra is None for extra in extras):
        return None
    if all(isinstance(extra, dict) for extra in extras):  # a name that only some have is None in the others
        names = dict.fromkeys(name for extra in extras for name in extra)
        extras = [{name: extra.get(name) for name in names} for extra in extras]
    return join_rows(extras, sizes)
