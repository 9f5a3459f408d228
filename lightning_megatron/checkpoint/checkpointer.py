"""``Checkpointer``: saves and loads checkpoints for the strategy's checkpoint hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import megatron.core
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from megatron.core.dist_checkpointing import ShardedTensor

from lightning_megatron.checkpoint import (
    lightning_file,
    optimizer_groups,
    optimizer_shards,
    reading,
    save_plan,
    trainer_state,
    writing,
)
from lightning_megatron.checkpoint.async_saves import HostCopies, SaveQueue
from lightning_megatron.checkpoint.checkpointing import Checkpointing
from lightning_megatron.checkpoint.data_position import loop_progress
from lightning_megatron.checkpoint.data_position.resume import Resumption
from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.checkpoint.plateau_schedulers import PlateauSchedulers
from lightning_megatron.checkpoint.tensor_shards import ShardSpec, shard_specs, specs_by_parameter
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.training.optimizer import ShardedOptimizer
from lightning_megatron.training.whole_optimizer import WholeOptimizer

State = dict[str, Any]
_SHARDED = ("state_dict", "optimizer_states")


@dataclass
class Run:
    """The run that a checkpoint is saved from or loaded into.

    Args:
        trainer: The Trainer of the run.
        layout: The parallel sizes.
        optimizer: The optimizer; None outside of a fit.
        is_plain: Whether the module is a plain LightningModule, undivided on every rank.
        in_one_file: Whether the checkpoint is saved as one file in Lightning's own format.
    """

    trainer: pl.Trainer
    layout: ParallelLayout
    optimizer: ShardedOptimizer | WholeOptimizer | None
    is_plain: bool = False
    in_one_file: bool = False

    @property
    def module(self) -> pl.LightningModule:
        """The LightningModule of the run."""
        return self.trainer.lightning_module


class Checkpointer:
    """Saves and loads the checkpoints of one strategy.

    Args:
        checkpointing: How checkpoints are saved and loaded.
    """

    def __init__(self, checkpointing: Checkpointing) -> None:
        self.asynchronous = checkpointing.async_save
        self.verify = checkpointing.verify_checksums
        self.allow_pickle = checkpointing.allow_pickle
        self.saves = SaveQueue(checkpointing.on_save_error)
        self.resumption = Resumption(checkpointing.skip_batches)
        self.plateaus = PlateauSchedulers()
        self._copies = HostCopies()
        self._planners: dict[bool, save_plan.Planner] = {}
        self._convert: Callable[[State, Run], None] | None = None  # what is left to do of the optimizer's state

    def begin_fit(self) -> None:
        """Discard what an earlier run has loaded or left to do."""
        self.resumption.reset()
        self.plateaus.load([])

    def begin_evaluation(self, trainer: pl.Trainer) -> None:
        """Keep the loaders of the fit before the evaluation, so that a later save records their position."""
        self.resumption.restore_fit_loaders(trainer)

    # Saving

    def save(self, state: State, path: Path, run: Run) -> None:
        """Save a checkpoint; when this returns, it is complete or being written in the background.

        Args:
            state: The state that Lightning collected on this rank.
            path: The checkpoint's path, the same on every rank.
            run: The run to save.
        """
        self.saves.callbacks.remember(run.trainer)
        try:
            if run.in_one_file:
                self.saves.save(path, partial(self._write_one_file, state, path, run), background=False)
                return
            content = self._content(state, run)
            # A save after a run is never in the background: the script may end before it is complete.
            background = self.asynchronous and run.trainer.state.status == TrainerStatus.RUNNING
            if not (background and self._is_copied(content.part.items)):
                if not self.wait() and "callbacks" in state:  # they counted on a checkpoint that was not saved
                    state["callbacks"] = self.saves.callbacks.corrected_states(state["callbacks"])
                    content = self._content(state, run)
                if background:
                    self._copies.update(content.part.items)
            if background:
                content.part = self._copies.part
            self.saves.save(path, partial(writing.write, content, path), background)
        except CheckpointError as error:
            self.saves.handle_failure(error, path)

    def wait(self) -> bool:
        """Wait for the saves in the background; see ``SaveQueue.wait``."""
        return self.saves.wait()

    @contextmanager
    def synchronous(self) -> Iterator[None]:
        """Run the body with synchronous saves: what follows may end the run."""
        before, self.asynchronous = self.asynchronous, False
        try:
            yield
        finally:
            self.asynchronous = before

    def release_memory(self) -> None:
        """Free the memory that is kept for the next save."""
        self._copies = HostCopies()
        self._planners = {}

    def _is_copied(self, items: list[tuple[Any, torch.Tensor]]) -> bool:
        """Whether the save before has copied these values to host memory on every rank, as with ``save_last``."""
        return self.saves.is_busy and writing.agree("", self._copies.match(items))

    def _write_one_file(self, state: State, path: Path, run: Run) -> None:
        full, position = "optimizer_states" in state, loop_progress.position(run.trainer)
        # The loops' counts stay Lightning's, for whom else reads the file; a load of ours corrects them.
        ours: State = {"layout": asdict(run.layout), "position": asdict(position)}
        if full:
            ours["rank"] = self._own_record(state, position, run)
            ours["plateaus"] = self.plateaus.record(run.trainer)
            if run.optimizer is not None:
                ours["optimizer"] = lightning_file.put_optimizer(state, run.module, run.optimizer)
        lightning_file.write({**state, lightning_file.OURS: ours}, path)

    def _content(self, state: State, run: Run) -> writing.SaveContent:
        """Collect what to write; an error on one rank is raised on all."""
        full = "optimizer_states" in state
        optimizer = run.optimizer if full and isinstance(run.optimizer, ShardedOptimizer) else None
        planner = self._planners.setdefault(full, save_plan.Planner())
        known, problem = planner.knows(_tensors(state, optimizer)), ""
        if optimizer is not None and state["optimizer_states"]:
            state[optimizer_groups.KEY] = optimizer_groups.record(state, optimizer.group_weight_names)
        try:
            rank_state, files, about = self._all_but_tensors(state, run, full)
            shards = [] if known else _shards(state, run.module, optimizer)
        except Exception as error:
            problem = str(error) if isinstance(error, CheckpointError) else writing.describe(error)
        plan = planner.last if writing.agree(problem, known) else None
        if plan is None:
            plan = planner.plan(_shards(state, run.module, optimizer) if known else shards)
        return writing.SaveContent(writing.RankShards(plan.items), plan.metadata, rank_state, files, about)

    def _all_but_tensors(self, state: State, run: Run, full: bool) -> tuple[bytes, dict[str, bytes], State]:
        """Return this rank's own state and, on rank 0, the further files and the manifest's content."""
        position = loop_progress.position(run.trainer)
        loop_progress.correct_counts(state["loops"], position)
        own = self._own_record(state, position, run)
        rank_state = trainer_state.dumps(own, own["combined_loader"])
        plateaus = self.plateaus.record(run.trainer) if full else []
        if dist.get_rank() != 0:
            return rank_state, {}, {}
        rest = {key: value for key, value in state.items() if key not in _SHARDED}
        rest["optimizer_states"] = state.get("optimizer_states")
        if plateaus:
            rest["plateaus"] = plateaus
        others = {n: v for n, v in state["state_dict"].items() if not isinstance(v, torch.Tensor) and v is not None}
        plain, objects, names = trainer_state.split({**rest, "state_dict": others})
        files = {trainer_state.STATE: plain} | ({trainer_state.OBJECTS: objects} if objects else {})
        return rank_state, files, _about(state, run, full, names)

    def _own_record(self, state: State, position: loop_progress.Position, run: Run) -> State:
        """The random states and the position in the data of this rank."""
        loaders = state["loops"]["fit_loop"]["state_dict"].get("combined_loader")
        return self.resumption.record(run.trainer, position, run.layout.dp) | {"combined_loader": loaders}

    # Loading

    def load(self, path: Path, run: Run, weights_only: bool | None = None) -> State:
        """Read a checkpoint for this rank; it is complete and of this architecture, or every rank raises an error.

        Args:
            path: The checkpoint's path.
            run: The run to load it into.
            weights_only: Whether pickles are refused, as in ``torch.load``; None asks ``allow_pickle``.

        Raises:
            CheckpointError: It is incomplete or damaged, or the architectures differ.
        """
        self.wait()
        self._convert = None
        trust = self.allow_pickle if weights_only is None else not weights_only
        if run.is_plain and reading.is_one_file(path):
            return self._load_one_file(path, run, trust)
        path, about = reading.choose(path, run.trainer)
        reading.check(path, about, self.verify)
        read = partial(reading.on_each_rank, path, self.verify)
        state: State = read(lambda: reading.trainer_state_of(path, about, trust))
        full = state["optimizer_states"] is not None
        if not full:
            del state["optimizer_states"]
        resumes = full and run.trainer.state.fn == TrainerFn.FITTING
        if resumes and not state["optimizer_states"]:
            rank_zero_warn(f"{path} was saved by a run that had not trained: the optimizer starts without state.")
        optimizer = run.optimizer if resumes and state["optimizer_states"] else None
        tensors, finish = read(lambda: reading.read(path, run.module, optimizer))
        others = {n: v for n, v in run.module.state_dict().items() if not isinstance(v, torch.Tensor)}
        state["state_dict"] = {**others, **state["state_dict"], **tensors}
        if optimizer is not None:
            _put_into_form(state, optimizer, finish)
        else:
            self._convert = partial(self._read_optimizer, path)
        if resumes:
            self._read_rank_state(path, about, run, state)
            self.plateaus.load(state.get("plateaus", []))
        return state

    def _load_one_file(self, path: Path, run: Run, trust: bool) -> State:
        """Load a file of Lightning's format, written by this package or under another strategy."""
        state = reading.on_each_rank(path, True, lambda: lightning_file.read(path, trust))
        ours: State = state.pop(lightning_file.OURS, {})
        if not state.get("optimizer_states") or run.trainer.state.fn != TrainerFn.FITTING:
            return state
        self._convert = partial(self._convert_file, path, ours.get("optimizer", {}))
        if "rank" in ours:
            if "position" in ours:
                loop_progress.correct_counts(state["loops"], loop_progress.Position(**ours["position"]))
            before = ParallelLayout(**ours["layout"])
            self._take_record(path, ours["rank"], before, run, state)
        self.plateaus.load(ours.get("plateaus", []))
        return state

    def convert_optimizer_states(self, state: State, run: Run) -> None:
        """Have the ``optimizer_states`` of what ``load`` gave be as the run's optimizer takes them.

        A plain module on one rank is loaded before its optimizer is made, so that this comes later.

        Args:
            state: What ``load`` gave, which changes where that has not been done.
            run: The run, with its optimizer.

        Raises:
            CheckpointError: The optimizer has other parameters.
        """
        convert, self._convert = self._convert, None
        if convert is not None and state["optimizer_states"]:
            convert(state, run)

    def _convert_file(self, path: Path, ours: State, state: State, run: Run) -> None:
        optimizer = run.optimizer
        if isinstance(optimizer, WholeOptimizer):
            lightning_file.take_whole_optimizer(state, optimizer, ours)
        elif optimizer is not None:
            reading.on_each_rank(path, True, lambda: lightning_file.take_optimizer(state, run.module, optimizer, ours))

    def _read_optimizer(self, path: Path, state: State, run: Run) -> None:
        if (optimizer := run.optimizer) is not None:
            _, finish = reading.on_each_rank(path, self.verify, lambda: reading.read(path, run.module, optimizer))
            _put_into_form(state, optimizer, finish)

    def _read_rank_state(self, path: Path, about: dict[str, Any], run: Run, state: State) -> None:
        """Load this rank's random states and loaders; under another layout, those of a rank that read the same data."""
        before = ParallelLayout(**about["layout"])
        rank = dist.get_rank()
        if before != run.layout:
            replica = run.layout.coordinates(rank).dp % before.dp
            rank = next(r for r in range(before.world_size) if before.coordinates(r).dp == replica)
        file = path / writing.RANKS / f"{rank:05d}.pt"
        record = reading.on_each_rank(path, self.verify, lambda: trainer_state.loads_plain(file.read_bytes()))
        self._take_record(path, record, before, run, state)

    def _take_record(self, path: Path, record: State, before: ParallelLayout, run: Run, state: State) -> None:
        """Continue in the data where a rank of the layout ``before`` was."""
        loaders = record["combined_loader"]
        if loaders and before.dp != run.layout.dp:
            raise MisconfigurationException(
                f"The loader has a state_dict, of which {path} holds one per data-parallel replica, {before.dp} in all;"
                f" this run has {run.layout.dp} replicas. Resume with {before.dp} replicas, or with a plain DataLoader."
            )
        if loaders:
            state["loops"]["fit_loop"]["state_dict"]["combined_loader"] = loaders
        self.resumption.load(record, before == run.layout)


def _put_into_form(state: State, optimizer: ShardedOptimizer | WholeOptimizer, finish: Any) -> None:
    """Have ``optimizer_states`` be what the optimizer takes: its groups' settings, and what hands it the tensors."""
    optimizer_groups.regroup(state, optimizer.group_weight_names)
    state["optimizer_states"] = [{"hyper": state["optimizer_states"][0], "finish": finish}]


def _tensors(state: State, optimizer: ShardedOptimizer | None) -> list[tuple[str, Any]]:
    """Every tensor that is written as shards, under a unique name."""
    found = list(state["state_dict"].items())
    if optimizer is not None:
        for number, part in enumerate(optimizer.parameter_slices()):
            found.append((f"{number}", part.main_param))
            found += [(f"{number}.{name}", value) for name, value in optimizer.state.get(part.main_param, {}).items()]
    return found


def _shards(state: State, module: pl.LightningModule, optimizer: ShardedOptimizer | None) -> list[ShardedTensor]:
    """This rank's tensors as shards of the whole model's tensors."""
    where = shard_specs(module)
    shards = []
    for name, value in state["state_dict"].items():
        if isinstance(value, torch.Tensor):
            spec = _spec_of(where, name)
            shards += spec.shards(value.detach(), f"model.{spec.key}")
    if optimizer is not None:
        shards += optimizer_shards.shards(optimizer, specs_by_parameter(module, where))
    return shards


def _spec_of(where: dict[str, ShardSpec], name: str) -> ShardSpec:
    if name not in where:
        raise CheckpointError(
            f"on_save_checkpoint added {name!r} to the checkpoint's state_dict, but the module has no such tensor. Put"
            " it under a key of its own: checkpoint['mine'] = ..."
        )
    return where[name]


def _about(state: State, run: Run, full: bool, objects: list[str]) -> dict[str, Any]:
    versions = {"lightning": pl.__version__, "megatron-core": megatron.core.__version__, "torch": torch.__version__}
    return {
        "layout": asdict(run.layout),
        "global_step": state["global_step"],
        "epoch": state["epoch"],
        "weights_only": not full,
        "objects": objects,
        "versions": versions,
    }
