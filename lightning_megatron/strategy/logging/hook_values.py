"""Logs on every rank what a hook between the steps logs (``self.log``) on some pipeline stages or replicas only.

A MegatronModule's outputs are on the last pipeline stage, so a hook that logs what it has collected has nothing to log
on the other stages. A value that a hook logs waits for the end of the hook; there the ranks exchange what they have,
and all of them log the same. Only hooks that a user wrote cost this exchange; where no rank has logged, it is one flag.

It recognises hooks by the names under which Lightning profiles them; ``test_lightning_private.py`` fails when these
names change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.data import extract_batch_size
from torchmetrics import Metric

from lightning_megatron.distributed import collectives, lightning_private, process_groups
from lightning_megatron.distributed.layout import RankCoordinates
from lightning_megatron.strategy.logging import torchmetrics_private, torchmetrics_sync
from lightning_megatron.strategy.logging.recorder import reduce_values
from lightning_megatron.strategy.logging.user_state import taken_back

_SIGNATURE = inspect.signature(pl.LightningModule.log)
_STEPS = ("training_step", "validation_step", "test_step")
_AROUND_STEPS = ".optimizer_step"  # it calls training_step, in which each stage has its own states of metrics
_ENDS_OF_BATCHES = ("on_validation_batch_end", "on_test_batch_end")


@dataclass
class _Entry:
    """The values that a hook has logged under one name on one rank.

    Args:
        options: The other arguments of ``self.log``.
        metric: The name of the module's attribute that holds the logged metric; None for numbers.
        values: The numbers, or the metric's values on the last batch.
        weights: The weight of each value: ``batch_size``, or the batch size that Lightning finds.
    """

    options: dict[str, Any]
    metric: str | None = None
    values: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class HookLogs:
    """Listens to the hooks of a module and of callbacks, while ``log`` and ``profile`` stand in for Lightning's own.

    Args:
        module: The module whose ``log`` is replaced.
        counts: Tells whether the batch that was run last counts on this rank; in an evaluation some do not.
    """

    def __init__(self, module: pl.LightningModule, counts: Callable[[], bool]) -> None:
        self._module = module
        self._counts = counts
        self._profiler = module.trainer.profiler  # type: ignore[attr-defined]
        self._running: list[tuple[str, dict[str, _Entry]]] = []  # running actions, and what each has logged
        self._listens: dict[str, bool] = {}
        self._counts_of_metrics: list[int] = []

    def profile(self, action: str) -> AbstractContextManager[Any]:
        """Stand in for the profiler's ``profile``, with which Lightning surrounds each hook."""
        return self._surround(action)

    @contextmanager
    def _surround(self, action: str) -> Iterator[Any]:
        pending: dict[str, _Entry] = {}
        self._running.append((action, pending))
        listens = self._is_listened_to(action)
        try:
            agreed: Any = nullcontext()
            if listens and not action.endswith(_AROUND_STEPS):
                agreed = torchmetrics_sync.same_on_all_stages(self._module, self._counts_of_metrics)
            with type(self._profiler).profile(self._profiler, action) as found, agreed, self._counted(action):
                yield found
        finally:
            self._running.pop()
        if listens:
            self._share(pending)

    @contextmanager
    def _counted(self, action: str) -> Iterator[None]:
        """Surround a hook; where the hook's batch does not count, undo what it changes in the module's state."""
        if not (action.endswith(_ENDS_OF_BATCHES) and self._is_listened_to(action)) or self._counts():
            yield
            return
        with torchmetrics_sync.untouched(self._module), taken_back([self._module, *self._owners(action)]):
            yield

    def log(self, *args: Any, **options: Any) -> None:
        """Stand in for ``module.log``."""
        trainer = self._module.trainer
        action, pending = self._running[-1] if self._running else ("", {})
        if not self._is_listened_to(action) or lightning_private.results(trainer) is None:
            type(self._module).log(self._module, *args, **options)
            return
        given = _SIGNATURE.bind(self._module, *args, **options).arguments
        given.pop("self")
        name, value = given.pop("name"), given.pop("value")
        if action.endswith(_ENDS_OF_BATCHES) and not self._counts():
            return
        entry = pending.setdefault(name, _Entry(given))
        if isinstance(value, Metric):
            entry.metric = given.get("metric_attribute") or torchmetrics_sync.attribute_of(self._module, value)
            value = torchmetrics_private.value_on_batch(value)
        one = isinstance(value, torch.Tensor) and value.numel() == 1
        entry.values.append(value.item() if one else value.detach().cpu() if isinstance(value, torch.Tensor) else value)
        entry.weights.append(float(given.get("batch_size") or self._rows()))

    def _is_listened_to(self, action: str) -> bool:
        """Whether ``action`` is a hook that may log, and that neither Lightning nor this package has written."""
        if action not in self._listens:
            self._listens[action] = self._is_written_by_a_user(action)
        return self._listens[action]

    def _is_written_by_a_user(self, action: str) -> bool:
        _, _, hook = action.rpartition(".")
        if hook in _STEPS or not lightning_private.may_log(hook):
            return False
        owners = self._owners(action)
        written_in = [getattr(inspect.unwrap(getattr(owner, hook)), "__module__", "") for owner in owners]
        return any(not name.startswith(("lightning.", "lightning_megatron.")) for name in written_in)

    def _owners(self, action: str) -> list[Any]:
        """The objects whose hook is running: the module, or the callbacks with one state key."""
        place, _, _ = action.rpartition(".")
        if place.startswith("[LightningModule]"):
            return [self._module]
        callbacks = self._module.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if place == f"[Callback]{callback.state_key}"]

    def _rows(self) -> int:
        """The batch size by which Lightning would weigh a value that is logged now."""
        batch = lightning_private.results(self._module.trainer).batch
        return 1 if batch is None else extract_batch_size(batch)

    def _share(self, pending: dict[str, _Entry]) -> None:
        """Log on all ranks what any of them has logged in this hook."""
        (noted,) = collectives.on_any_rank(bool(pending))
        if not noted:
            return
        here = process_groups.coordinates(), pending
        every: list[Any] = [here] * dist.get_world_size()
        dist.all_gather_object(every, here)
        for name in dict.fromkeys(name for _, entries in every for name in entries):
            self._replay(name, _chosen(name, every))

    def _replay(self, name: str, entries: list[_Entry]) -> None:
        """Log what the replicas logged under one name."""
        first = entries[0]
        options = {**first.options, "batch_size": sum(w for entry in entries for w in entry.weights)}
        values = [value for entry in entries for value in entry.values]
        weights = [weight for entry in entries for weight in entry.weights]
        value: Any
        if first.metric is not None:
            value = self._module.get_submodule(first.metric)
            # The last stage's states are known when it is computed.
            torchmetrics_private.set_update_count(value, max(value.update_count, 1))
            known = [v for v in values if v is not None]
            on_batch = reduce_values(known, [1.0] * len(known), "mean") if known else None
            torchmetrics_private.set_value_on_batch(value, _tensor(on_batch, value.device))
            options["metric_attribute"] = first.metric
        else:
            value = reduce_values(values, weights, first.options.get("reduce_fx", "mean"))
            options.update(sync_dist=True, sync_dist_group=process_groups.REDUCED)
        type(self._module).log(self._module, name, value, **options)


def _chosen(name: str, every: list[tuple[RankCoordinates, dict[str, _Entry]]]) -> list[_Entry]:
    """The entries to log, one for each replica: those of the last pipeline stage that has logged the name.

    An earlier stage has no outputs, so its value means nothing. A sum that is not reduced over replicas, and a value
    that only rank 0 logs, are the first replica's. Ranks that share rows (cp) have one entry each where they differ.
    """
    found = {place: entries[name] for place, entries in every if name in entries}
    stage = max(place.pp for place in found)
    of_copies: dict[tuple[int, int], _Entry] = {}
    for place in sorted((p for p in found if p.pp == stage), key=lambda p: (p.dp, p.cp, p.tp)):
        of_copies.setdefault((place.dp, place.cp), found[place])
    differing: dict[tuple[int, str], _Entry] = {}
    for (replica, _), entry in of_copies.items():
        differing.setdefault((replica, repr((entry.values, entry.weights))), entry)
    entries = list(differing.values())
    options = entries[0].options
    is_sum = options.get("reduce_fx") in ("sum", torch.sum)
    alone = options.get("rank_zero_only") or (is_sum and not options.get("sync_dist"))
    return entries[:1] if alone else entries


def _tensor(value: Any, device: torch.device) -> Any:
    return torch.tensor(value, device=device) if isinstance(value, int | float) else value
