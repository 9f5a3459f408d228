"""``Checkpointer``: what the strategy's checkpoint hooks call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import megatron.core
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from megatron.core.dist_checkpointing import ShardedTensor

from lightning_megatron.checkpoint import (
    loading,
    manifest,
    optimizer_state,
    progress,
    trainer_state,
    weights,
    writing,
)
from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.checkpoint.places import Place, by_parameter, places
from lightning_megatron.checkpoint.resumption import Resumption
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.optimizer import ShardedOptimizer

State = dict[str, Any]
_SHARDED = ("state_dict", "optimizer_states")


@dataclass
class Run:
    """What a checkpoint is of.

    Args:
        trainer: Whose.
        layout: The sizes of the run.
        optimizer: None outside of a fit.
    """

    trainer: pl.Trainer
    layout: ParallelLayout
    optimizer: ShardedOptimizer | None

    @property
    def module(self) -> pl.LightningModule:
        """The module that is trained."""
        return self.trainer.lightning_module


class Checkpointer:
    """Saves and loads the checkpoints of one strategy.

    Args:
        asynchronous: Whether files are written beside training.
        verify: Whether a load checks every file's checksum.
        trust: Whether a load may unpickle objects.
        on_save_error: "raise", or "warn" and go on training.
        skip_batches: Batches to leave out after a load.
    """

    def __init__(
        self,
        asynchronous: bool,
        verify: bool,
        trust: bool,
        on_save_error: Literal["raise", "warn"] = "raise",
        skip_batches: int = 0,
    ) -> None:
        if on_save_error not in ("raise", "warn"):
            raise MisconfigurationException(
                f"MegatronStrategy(on_save_error={on_save_error!r}): use 'raise' or 'warn'."
            )
        if skip_batches < 0:
            raise MisconfigurationException(f"MegatronStrategy(skip_batches={skip_batches}): use a number from 0.")
        self.asynchronous = asynchronous
        self.verify = verify
        self.trust = trust
        self.on_save_error = on_save_error
        self.resumption = Resumption(skip_batches)
        self._last_save_failed = False
        self._background = writing.Background()
        self._copies = writing.HostCopies()
        self._planners: dict[bool, weights.Planner] = {}

    # Saving

    def save(self, state: State, path: Path, run: Run) -> None:
        """Save; when this returns the checkpoint is whole, or being written in the background.

        Args:
            state: What Lightning collected on this rank.
            path: The same on every rank.
            run: What it is of.
        """
        try:
            content = self._content(state, run)
            # After a run nobody is there to wait: the script may end.
            if not self.asynchronous or run.trainer.state.status != TrainerStatus.RUNNING:
                self.wait()
                writing.write(content, path)
                self._last_save_failed = False
                return
            if not self._is_copied(content.part.items):
                self.wait()
                self._copies.take(content.part.items)
            content.part = self._copies.part
            self._background.start(lambda: writing.write(content, path))
        except CheckpointError as error:
            self._failed(error)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Have saves be whole when they return, where what follows may end the run."""
        before, self.asynchronous = self.asynchronous, False
        try:
            yield
        finally:
            self.asynchronous = before

    def wait(self) -> None:
        """Wait for a save that goes on in the background.

        Raises:
            CheckpointError: It failed; on every rank.
        """
        if not self._background.busy:
            return
        try:
            self._background.wait()
            self._last_save_failed = False
        except CheckpointError as error:
            self._failed(error)

    def give_up(self) -> None:
        """After an error: let a save in the background end, and say so if it failed; the error is what is raised."""
        try:
            self.wait()
        except Exception as error:
            rank_zero_warn(str(error))

    def remove(self, path: Path) -> None:
        """Delete a checkpoint; called by every rank, done by the first, and not before a newer one is whole."""
        if self._last_save_failed:
            rank_zero_warn(f"{path} is kept: the save after it failed.")
        elif dist.get_rank() == 0:
            self._in_turn(lambda: manifest.remove(path), f"{path} could not be removed")

    def link(self, path: Path, target: Path) -> None:
        """Have ``path`` be a link to ``target`` once that is whole; called by every rank, done by the first."""
        if dist.get_rank() == 0 and path != target and not self._last_save_failed:
            self._in_turn(lambda: manifest.make_link(path, target), f"{path} could not be linked to {target}")

    def rest(self) -> None:
        """Let go of the memory that is kept for the next save."""
        self._copies = writing.HostCopies()
        self._planners = {}

    def _in_turn(self, action: Callable[[], None], otherwise: str) -> None:
        """Do something now, or once the save that goes on has succeeded; the training is worth more than that."""

        def attempt() -> None:
            try:
                action()
            except OSError as error:
                rank_zero_warn(f"{otherwise}: {error}")

        if self._background.busy:
            self._background.start(attempt)
        else:
            attempt()

    def _is_copied(self, items: list[tuple[Any, torch.Tensor]]) -> bool:
        """Whether every rank has these very values in host memory, from the save before (as with ``save_last``)."""
        return self._background.busy and writing.agree("", self._copies.hold(items))

    def _failed(self, error: CheckpointError) -> None:
        self._last_save_failed = True
        if self.on_save_error == "raise":
            raise error
        rank_zero_warn(f"{str(error).rstrip(chr(46))}. Training goes on without it.")

    def _content(self, state: State, run: Run) -> writing.Content:
        """What to write, on all ranks, or an error on all ranks."""
        full = "optimizer_states" in state
        optimizer = run.optimizer if full else None
        planner = self._planners.setdefault(full, weights.Planner())
        known, problem = planner.knows(_tensors(state, optimizer)), ""
        try:
            rank_state, files, about = self._all_but_tensors(state, run, full)
            shards = [] if known else _shards(state, run.module, optimizer)
        except Exception as error:
            problem = str(error) if isinstance(error, CheckpointError) else writing.describe(error)
        plan = planner.last if writing.agree(problem, known) else None
        if plan is None:
            plan = planner.plan(_shards(state, run.module, optimizer) if known else shards)
        return writing.Content(writing.Part(plan.items), plan.metadata, rank_state, files, about)

    def _all_but_tensors(self, state: State, run: Run, full: bool) -> tuple[bytes, dict[str, bytes], State]:
        """This rank's own state, and of the first rank its files and the manifest."""
        position = progress.position(run.trainer)
        progress.put_right(state["loops"], position)
        loaders = state["loops"]["fit_loop"]["state_dict"].get("combined_loader")
        own = self.resumption.record(run.trainer, position, run.layout.dp) | {"combined_loader": loaders}
        rank_state = trainer_state.dumps(own, loaders)
        if dist.get_rank() != 0:
            return rank_state, {}, {}
        rest = {key: value for key, value in state.items() if key not in _SHARDED}
        rest["optimizer_states"] = state.get("optimizer_states")
        others = {n: v for n, v in state["state_dict"].items() if not isinstance(v, torch.Tensor) and v is not None}
        plain, objects, names = trainer_state.split({**rest, "state_dict": others})
        files = {trainer_state.STATE: plain} | ({trainer_state.OBJECTS: objects} if objects else {})
        return rank_state, files, _about(state, run, full, names)

    # Loading

    def load(self, path: Path, run: Run) -> State:
        """Read a checkpoint for this rank: whole and of this architecture, or an error on every rank.

        Raises:
            CheckpointError: It is not whole, is damaged, or does not fit.
        """
        self.wait()
        path, about = loading.choose(path, run.trainer)
        loading.check(path, about, self.verify)
        state = loading.trainer_state_of(path, about, self.trust)
        full = state["optimizer_states"] is not None
        if not full:
            del state["optimizer_states"]
        tensors, finish = loading.read(path, run.module, run.optimizer if full else None)
        others = {n: v for n, v in run.module.state_dict().items() if not isinstance(v, torch.Tensor)}
        state["state_dict"] = {**others, **state["state_dict"], **tensors}
        if full and run.optimizer is not None:
            state["optimizer_states"] = [{"hyper": state["optimizer_states"][0], "finish": finish}]
        if full and run.trainer.state.fn == TrainerFn.FITTING:
            self._read_rank_state(path, about, run, state)
        return state

    def _read_rank_state(self, path: Path, about: dict[str, Any], run: Run, state: State) -> None:
        """This rank's random states and loaders, or under another layout those of a rank with the same data."""
        before = ParallelLayout(**about["layout"])
        same_layout = before == run.layout
        rank = dist.get_rank()
        if not same_layout:
            replica = run.layout.coordinates(rank).dp % before.dp
            rank = next(r for r in range(before.world_size) if before.coordinates(r).dp == replica)
        record = trainer_state.loads_plain((path / writing.RANKS / f"{rank:05d}.pt").read_bytes())
        loaders = record["combined_loader"]
        if loaders and before.dp != run.layout.dp:
            raise MisconfigurationException(
                f"The loader keeps its own place (state_dict), of which {path} has one per replica, {before.dp} of"
                f" them; this run has {run.layout.dp} replicas. Resume with as many, or with a plain DataLoader."
            )
        if loaders:
            state["loops"]["fit_loop"]["state_dict"]["combined_loader"] = loaders
        self.resumption.load(record, same_layout)


def link_when_whole(trainer: pl.Trainer) -> None:
    """Have the links of ``ModelCheckpoint(save_last="link")`` made by the checkpointer.

    Lightning makes them at once, to a checkpoint that may still be being written.
    """
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "save_last", None) == "link":
            callback._link_checkpoint = _link  # type: ignore[attr-defined]  # private (Lightning 2.6)


def _link(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
    checkpointer = getattr(trainer.strategy, "checkpointer", None)
    if checkpointer is None:  # the callback has come to a run under another strategy
        ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
    else:
        checkpointer.link(local_path(linkpath), local_path(filepath))


def local_path(path: Any) -> Path:
    """A path on a file system that is mounted.

    Raises:
        MisconfigurationException: It is the address of something else.
    """
    text = os.fspath(path)
    if "://" in text and not text.startswith("file://"):
        raise MisconfigurationException(
            f"MegatronStrategy cannot save to or load from {text!r}: every rank writes its part of a directory, which"
            " is then renamed, and object stores rename nothing. Use a directory that all nodes mount (ModelCheckpoint("
            "dirpath=...)), and copy finished checkpoints from there."
        )
    return Path(text.removeprefix("file://"))


def _tensors(state: State, optimizer: ShardedOptimizer | None) -> list[tuple[str, Any]]:
    """All that is written as shards, by names that tell one from the other."""
    found = list(state["state_dict"].items())
    if optimizer is not None:
        for number, held in enumerate(optimizer.held()):
            found.append((f"{number}", held.main))
            found += [(f"{number}.{name}", value) for name, value in optimizer.state.get(held.main, {}).items()]
    return found


def _shards(state: State, module: pl.LightningModule, optimizer: ShardedOptimizer | None) -> list[ShardedTensor]:
    """This rank's tensors, with their places in the whole model's."""
    where = places(module)
    shards = []
    for name, value in state["state_dict"].items():
        if isinstance(value, torch.Tensor):
            place = _place(where, name)
            shards += place.shards(value.detach(), f"model.{place.key}")
    if optimizer is not None:
        shards += optimizer_state.shards(optimizer, by_parameter(module, where))
    return shards


def _place(where: dict[str, Place], name: str) -> Place:
    if name not in where:
        raise CheckpointError(
            f"on_save_checkpoint added {name!r} to the checkpoint's state_dict, which is no tensor of the module. Put"
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
