"""Runs megatron-core's pipeline schedules over the micro-batches of a batch, and finalises the gradients.

It knows neither Lightning nor any task: a ``step`` function runs one micro-batch through one model chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
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
from lightning_megatron.distributed.megatron_versions import mark_sinks
from lightning_megatron.training import expert_gradients, window_counts
from lightning_megatron.training.batch_rows import join_rows
from lightning_megatron.training.counted_once import is_divided_expert
from lightning_megatron.training.microbatches import MicroBatchSizes, slices
from lightning_megatron.training.partial_gradients import warn_of_partial
from lightning_megatron.training.step_outputs import joined, loss_of, outputs_of, passed_on, travelling
from lightning_megatron.training.timers import Timers
from lightning_megatron.training.weight_gradients import accept_products, refuse_products

# A function of (micro-batch, its share of the batch's rows, chunk number). On the last stage it returns a loss, which
# is a mean or a sum with its weight, or a dict with a "loss"; in an evaluation it may return anything. Before
# the last stage, its result goes to the next stage if it has the shape of the chunk's output; else that output does.
Step = Callable[[Any, float, int], Any]


_NO_LOSS = (
    "training_step returned {}. MegatronStrategy cannot skip a batch, since replicas and stages wait for one another."
    " Return a loss, or a dict with a loss under 'loss'; return loss * 0.0 if the batch is not to count."
)
_MEAN_OF_A_PART = (
    "The loss of a micro-batch is a plain mean, and with cp={} each rank has a part of each sequence: a mean over its"
    " own tokens says nothing of the others. Return the sum over tokens and their number (from loss), or use cp=1."
)
_TINY = torch.finfo(torch.float64).tiny  # in place of a weight of zero


@dataclass(frozen=True)
class Outcome:
    """The result of one batch, the same on every rank.

    Args:
        loss: Mean loss of the global batch, a float32 scalar.
        weight: The sum of the weights, a float32 scalar: tokens over all data-parallel replicas, or for means the
            number of replicas.
        has_logged_values: Whether any rank has logged a value in this batch, so that all ranks gather what was logged.
        has_loss: Whether the steps returned losses.
        returned: The values that the steps returned beside losses, joined over micro-batches by rows; None if nothing.
    """

    loss: torch.Tensor
    weight: torch.Tensor
    has_logged_values: bool
    has_loss: bool = True
    returned: Any = None

    @property
    def hook_outputs(self) -> Any:
        """The outputs for hooks at the end of a batch: what one step on the whole batch would have returned."""
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
        by_token: Whether losses are weighed by their tokens; otherwise every micro-batch is weighed by its rows.
        device: The device of the model.
        rng_context: Makes the context around each schedule that provides the model's random numbers.
        own_layers: Whether the user wrote layers, whose gradients are looked at once.
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
        own_layers: bool = False,
    ) -> None:
        self.layout = layout
        self._looks_at_gradients = own_layers and layout.tp > 1
        self.config = config
        self.by_token = by_token
        self.device = device
        self._rng_context = rng_context
        self.trains = ddp is not None
        for chunk in chunks:
            process_groups.rebind(chunk)  # the groups of an earlier run may have been destroyed
            mark_sinks(chunk)
        self.chunks: list[Any] = [_wrap(c, config, ddp, i) for i, c in enumerate(chunks)] if ddp else list(chunks)
        for number, chunk in enumerate(self.chunks):
            chunk.__dict__["chunk_number"] = number
        self._overlaps = bool(ddp and ddp.overlap_grad_reduce)
        # Whether a rank holds a part of the model, not the whole.
        self.is_model_sharded = layout.pp > 1 or any(
            getattr(p, "tensor_model_parallel", False) or is_divided_expert(p) for p in chunks[0].parameters()
        )
        self._counting_layers = window_counts.counting_layers(chunks) if ddp else []
        self._buffer_views = [(p, p.data, p.requires_grad) for chunk in self.chunks for p in chunk.parameters()]
        self.has_logged_values: Callable[[], bool] = lambda: False  # called after each batch
        self._window_weight = torch.zeros((), dtype=torch.float64, device=device)
        self.window_losses: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each batch: the global, and this rank's
        self.has_gradients = False  # whether a batch was run since the last optimizer step
        self._buffers = [pair for chunk in chunks for pair in _kept_buffers(chunk)] if layout.dp * layout.cp > 1 else []
        self.share_buffers()
        self.timers: Timers | None = None
        self._local_loss = torch.zeros((), device=device)  # the last batch's sum on this rank; 0 before the last stage

    def zero_grad(self) -> None:
        """Zero the gradients, the weight of the accumulation window and the losses of its batches."""
        self._window_weight.zero_()
        self.window_losses = []
        self.has_gradients = False
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def set_timers(self, timers: Timers | None) -> None:
        """Set the timers that megatron-core starts and stops; None for no timers."""
        self.timers = timers
        for config in {id(chunk.config): chunk.config for chunk in self.chunks}.values():
            config.timers = timers

    def remove_hooks(self) -> None:
        """Remove the hooks from the model: another engine or strategy may train it next."""
        for chunk in self.chunks if self.trains else ():
            if chunk.remove_forward_pre_hook_handles:
                chunk.disable_forward_pre_hook(param_sync=False)
            chunk.param_to_bucket_group = {}
            refuse_products(chunk.params_with_grad)
            for node in chunk.grad_accs:
                _take_hooks_off(node)
            chunk.grad_accs.clear()

    def restore_moved_weights(self) -> bool:
        """Move weights that ``parameter.data = ...`` replaced back to megatron-core's buffers; whether any were."""
        moved = [
            (p, view) for p, view, _ in self._buffer_views if p.data_ptr() != view.data_ptr() or p.dtype != view.dtype
        ]
        for parameter, view in moved:
            view.copy_(parameter.data)
            parameter.data = view
        return bool(moved)

    def _check_trained(self) -> None:
        """Refuse a ``requires_grad`` that has changed since the gradient buffers were laid out."""
        if any(parameter.requires_grad != trained for parameter, _, trained in self._buffer_views):
            raise RuntimeError(
                "requires_grad of a parameter has changed during a run, but megatron-core's gradient buffers are laid"
                " out at its start. Freeze and unfreeze before fit, and call fit again for the next phase."
            )

    def share_buffers(self) -> None:
        """Copy the buffers of the first replica (running means) to the others; a training step makes them differ."""
        collectives.broadcast_from_first_copy([getattr(module, name) for module, name in self._buffers])

    def finish_param_gather(self) -> None:
        """Gather the weights that ``overlap_param_gather`` would gather in the next forward pass."""
        if self.trains and self.chunks[0].ddp_config.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def train(
        self, batch: Any, cut: MicroBatchSizes, length: int, step: Step, *, window: int, last_of_window: bool
    ) -> Outcome:
        """Run forward and backward over one batch; after the last batch of a window, finalise the gradients.

        Args:
            batch: The batch of one data-parallel rank.
            cut: The sizes of its micro-batches.
            length: Sequence length of the hidden states between stages.
            step: The function that runs one micro-batch through one chunk.
            window: Number of batches that are accumulated into one optimizer step.
            last_of_window: Whether the optimizer steps after this batch.

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
        outcome = self._outcome(records, cut)
        self.window_losses.append((outcome.loss, self._local_loss))
        return outcome

    def finish_window(self, window: int) -> None:
        """Finalise the gradients of a window whose last batch was skipped."""
        self._finalize(window, self.chunks, None)

    def evaluate(self, batch: Any, cut: MicroBatchSizes, length: int, step: Step) -> Outcome:
        """Compute the loss of one batch, forward only."""
        return self._outcome(self._run(batch, cut, length, step, forward_only=True), cut)

    def predict(self, batch: Any, cut: MicroBatchSizes, length: int, step: Step) -> Any:
        """Return the outputs of the last stage, joined by rows in order, on every stage."""
        outputs = self._run(batch, cut, length, step, forward_only=True, collect=True)
        whole = join_rows(outputs[: len(cut.sizes)], list(cut.sizes)) if outputs else None
        return self._from_last_stage(whole)

    def _run(
        self, batch: Any, cut: MicroBatchSizes, length: int, step: Step, *, forward_only: bool, collect: bool = False
    ) -> list[Any]:
        """Run the schedule; return what the last stage recorded for each micro-batch, and nothing on other stages."""
        records: list[Any] = []
        parts = self.layout.tp if self.config.sequence_parallel else 1
        hidden_shape = (length // (parts * self.layout.cp), cut.sizes[0], getattr(self.config, "hidden_size", 0))

        def forward_step(micro_batches: Iterator[tuple[Any, float]], model: torch.nn.Module) -> tuple[Any, Any]:
            micro_batch, share = next(micro_batches)
            number = model.__dict__["chunk_number"]
            with outputs_of(model) as given:
                output = step(micro_batch, share, number)
            tensor = passed_on(output, given, self.device)
            if given:
                tensor = travelling(tensor, hidden_shape)
            return tensor, partial(finish, output, share)

        def finish(output: Any, share: float, _: torch.Tensor, non_loss_data: bool = False) -> Any:
            if non_loss_data:
                records.append(output)
                return output
            loss, extra = loss_of(output, may_be_rows=forward_only and 1 in cut.sizes)
            if loss is None and not forward_only:
                raise TypeError(_NO_LOSS.format("None" if output is None else f"no loss but {output!r:.200}"))
            total, weight = self._weigh(loss, share)
            extra = apply_to_collection(extra, torch.Tensor, torch.Tensor.detach, allow_frozen=True)
            weight = weight.detach().reshape(()) if isinstance(weight, torch.Tensor) else weight
            records.append((total.detach(), weight, loss is not None, extra))
            if not forward_only:
                self._window_weight += weight
            return total, torch.zeros((), dtype=torch.int, device=total.device), {}

        cut = self._equally_many(cut)
        iterators = [slices(batch, cut) for _ in self.chunks]
        several = len(self.chunks) > 1
        with self._rng_context():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if several else iterators[0],
                model=self.chunks if several else self.chunks[0],
                num_microbatches=len(cut.sizes) + cut.num_padding,
                seq_length=length,
                micro_batch_size=cut.sizes[0],
                forward_only=forward_only,
                collect_non_loss_data=collect,
            )
        return records

    def _equally_many(self, cut: MicroBatchSizes) -> MicroBatchSizes:
        """Where replicas share experts, as many micro-batches on each of them, further ones with weight 0.

        They wait for one another in each layer, and a replica's batch may have fewer rows.
        """
        if not self.layout.replicas_share_experts:
            return cut
        count = len(cut.sizes) + cut.num_padding
        most = max(collectives.gather(count, process_groups.gloo_world()))
        return replace(cut, num_padding=cut.num_padding + most - count)

    def _weigh(self, loss: Any, share: float) -> tuple[torch.Tensor, Any]:
        """A micro-batch's loss as a weighted sum and its weight; both are 0 for padding and without a loss."""
        if loss is None:
            return torch.zeros((), device=self.device), 0.0
        if isinstance(loss, tuple):
            total, tokens = loss
            if self.by_token:
                return (total, tokens) if share else (total * 0.0, 0.0)
            return total / collectives.sum_over_parts_of_rows(tokens).clamp(min=1) * share, share / self.layout.cp
        if self.layout.cp > 1:
            raise TypeError(_MEAN_OF_A_PART.format(self.layout.cp))
        return loss.reshape(()) * share, share

    def _finalize(self, window: int, model: Any, _: Any, pg_collection: Any = None, **__: Any) -> None:
        """Reduce the gradients over all replicas and divide them by the weight of the whole window.

        The weight is the number of tokens, or for means the number of batches in the window, as in Lightning.
        megatron-core would divide, too, but not before the host has seen the weight.
        """
        finalize_model_grads(model, None, pg_collection=pg_collection)
        weight = self._window_weight.float() if self.by_token else self._number(window / self.layout.cp)
        pipeline = process_groups.pipeline()
        if pipeline.size() > 1:  # the last stage knows it
            dist.broadcast(weight, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
        if self.layout.dp * self.layout.cp > 1:
            dist.all_reduce(weight, group=process_groups.data_parallel())
        share = torch.where(weight > 0, 1.0 / weight, 1.0)
        for chunk in model:
            chunk.scale_gradients(share)
        shared_weights.all_reduce_gradients(model)
        expert_gradients.sum_parts(model)
        if self._looks_at_gradients:
            self._looks_at_gradients = not warn_of_partial(model)
        window_counts.finish(self._counting_layers)

    def _outcome(self, records: list[Any], cut: MicroBatchSizes) -> Outcome:
        """Compute the mean loss of the global batch on every rank, and join what else this replica's steps returned."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        local = sum((record[0].double() for record in records), zero)
        summed = torch.stack([local, sum((record[1] for record in records), zero)])
        for group in (process_groups.data_parallel(), process_groups.pipeline()):  # stages before the last add zeros
            if group.size() > 1:
                dist.all_reduce(summed, group=group)
        loss = (summed[0] / summed[1].clamp(min=_TINY)).float()
        self._local_loss = local
        extra = joined([r[3] for r in records[: len(cut.sizes)]], list(cut.sizes))
        flags: tuple[bool, ...] = (self.has_logged_values(), any(r[2] for r in records), extra is not None)
        if self.layout.dp * self.layout.cp * self.layout.pp > 1:  # tensor-parallel ranks run the same
            flags = collectives.on_any_rank(*flags)
        has_logged_values, has_loss, has_extra = flags
        returned = self._from_last_stage(extra) if has_extra else None
        return Outcome(loss, summed[1].float(), has_logged_values, has_loss, returned)

    def _number(self, value: float) -> torch.Tensor:
        """A scalar on the device; filling it there does not wait for the device, as copying it from the host would."""
        return torch.full((), value, dtype=torch.float32, device=self.device)

    def _from_last_stage(self, value: Any) -> Any:
        """Broadcast the last stage's value to every stage, onto its device."""
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
    """Wrap the chunk with gradient buffers and their hooks, which ``Engine.remove_hooks`` removes."""
    wrapped = DistributedDataParallel(config, replace(ddp), chunk, disable_bucketing=number > 0)
    if not ddp.overlap_grad_reduce:  # its hooks wait for every weight's gradient
        accept_products(wrapped.params_with_grad)
    wrapped.broadcast_params()
    _equalise_replicated(chunk)
    return wrapped


def _take_hooks_off(node: Any) -> None:
    """Remove megatron-core's hooks from an autograd node, which the optimizer's slices of the weights refer to.

    The hooks refer to the model and with it the optimizer: a cycle through autograd, which Python cannot collect.
    """
    # A hook of our own gives access to megatron-core's, of which it keeps no handles (0.16.1).
    handle = node.register_hook(lambda *_: None)
    hooks = handle.hooks_dict_ref()
    handle.remove()
    for key in [key for key, hook in hooks.items() if hook.__module__ == DistributedDataParallel.__module__]:
        del hooks[key]


def _kept_buffers(chunk: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """The persistent buffers of all layers, such as the running mean of a batch norm; private in torch (2.13)."""
    named = [(module, name) for module in chunk.modules() for name, b in module._buffers.items() if b is not None]
    return [(module, name) for module, name in named if name not in module._non_persistent_buffers_set]


def _equalise_replicated(chunk: torch.nn.Module) -> None:
    """Copy weights that are not divided over the tensor-parallel ranks from the first of these ranks."""
    group = process_groups.tensor_parallel()
    for parameter in chunk.parameters():
        if not getattr(parameter, "tensor_model_parallel", False) and not is_divided_expert(parameter):
            dist.broadcast(parameter.data, src=dist.get_global_rank(group, 0), group=group)
