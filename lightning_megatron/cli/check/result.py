"""``RunCheck``: what a run is made of, what is wrong with it, and what could not be checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.distributed.memory_table import MemoryTable


@dataclass
class LoaderCheck:
    """The first batch of a loader.

    Args:
        name: "train" or "val", with a number where there are several.
        batches: Batches of an epoch on one replica; None where the loader does not know.
        rows: Rows of the first batch on one replica.
        last_rows: Rows of the last batch of an epoch, where it has fewer than the first.
        tensors: Shape and type of each tensor of the batch, by its key.
        texts: The beginning of the first row as text, by the key of its token ids.
    """

    name: str
    batches: int | None = None
    rows: int | None = None
    last_rows: int | None = None
    tensors: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The lines that tell people what the batch is."""
        many = "batches of unknown number" if self.batches is None else f"{self.batches:,} batches on each replica"
        last = f"; the last one has {_rows(self.last_rows)}" if self.last_rows else ""
        tensors = ", ".join(f"{name} {about}" for name, about in self.tensors.items())
        return [f"{many}{last}: {tensors}", *(f"{key}: {text!r}" for key, text in self.texts.items())]


@dataclass
class RunCheck:
    """What ``check_run`` has found.

    Args:
        source: The YAML file.
        faults: Why the run would fail, or not fit the GPU; empty where nothing is wrong.
        unchecked: What could not be looked at here, such as data that only the cluster has.
        devices: Ranks of each machine.
        layout: The parallel sizes; None where they do not fit the number of ranks.
        module: Name of the module's class.
        num_parameters: Weights of the whole model, without low-rank updates; None where a size is not known.
        num_active: Those of them that a token uses, where it does not use all experts.
        num_trained: Those that are trained where low-rank updates are, the updates among them.
        precision: As ``Trainer(precision=)`` has it.
        rows: Rows of one optimizer step on one replica.
        accumulated: Batches of one optimizer step (``accumulate_grad_batches``).
        micro_batches: Rows of each micro-batch of a batch.
        tokens: Tokens of one optimizer step on all replicas.
        memory: Bytes of a rank of each pipeline stage, by kind; None where the module is of no family that is known.
        states: In words, what is known of the memory of a module of no such family.
        device: "cuda" or "cpu", which the memory is estimated for.
        gpu_memory: GB of each GPU, if they were told.
        loaders: The first batch of each loader.
    """

    source: str
    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    devices: int = 1
    layout: ParallelLayout | None = None
    module: str | None = None
    num_parameters: int | None = None
    num_active: int | None = None
    num_trained: int | None = None
    precision: str = "32-true"
    rows: int | None = None
    accumulated: int = 1
    micro_batches: tuple[int, ...] = ()
    tokens: int | None = None
    memory: MemoryTable | None = None
    states: str | None = None
    device: str = "cuda"
    gpu_memory: float | None = None
    loaders: list[LoaderCheck] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0: the run can start. 1: it would fail. 2: nothing is known to be wrong, but not all could be checked."""
        return 1 if self.faults else 2 if self.unchecked else 0

    @property
    def global_batch(self) -> int | None:
        """Rows of one optimizer step on all replicas."""
        if self.rows is None or self.layout is None:
            return None
        return self.rows * self.accumulated * self.layout.dp

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        sizes = None if self.layout is None else {**asdict(self.layout), "dp": self.layout.dp}
        memory = None if self.memory is None else [asdict(stage) for stage in self.memory.stages]
        more = {"global_batch": self.global_batch, "exit_status": self.exit_status}
        return {**asdict(self), "layout": sizes, "memory": memory, **more}

    def __str__(self) -> str:
        told = [
            ("ranks", self._ranks()),
            ("model", self._model()),
            ("batch", self._batch()),
            ("memory", self._memory()),
            *((loader.name, loader.lines()) for loader in self.loaders),
        ]
        lines = [f"{title if not number else '':<9}{line}" for title, each in told for number, line in enumerate(each)]
        for title, each in (("Faults", self.faults), ("Not checked", self.unchecked)):
            if each:
                lines += ["", f"{title}:", *(f"- {line}" for line in each)]
        end = ("Nothing is wrong.", "The run would fail.", "Nothing else is wrong.")[self.exit_status]
        return "\n".join([*lines, "", end]).lstrip("\n")

    def _ranks(self) -> list[str]:
        if self.layout is None:
            return []
        layout = self.layout
        nodes = max(1, layout.world_size // self.devices)
        sizes = f"{layout.sizes}{', sequence_parallel' if layout.uses_sequence_parallel else ''}"
        machines = f" on {nodes} machines of {self.devices}" if nodes > 1 else ""
        return [f"{layout.world_size} {'ranks' if layout.world_size > 1 else 'rank'}{machines}: {sizes}"]

    def _model(self) -> list[str]:
        if self.module is None:
            return []
        if self.num_parameters is None:
            return [f"{self.module}, whose number of parameters is not known here"]
        trained = f"; LoRA trains {readable(self.num_trained)}" if self.num_trained is not None else ""
        active = f", of which a token uses {readable(self.num_active)}" if self.num_active is not None else ""
        return [f"{self.module} with {readable(self.num_parameters)} parameters{active}{trained}"]

    def _batch(self) -> list[str]:
        if self.global_batch is None or self.layout is None:
            return []
        cut = f"{len(self.micro_batches)} of {_rows(self.micro_batches[0])}" if self.micro_batches else "one"
        if len(set(self.micro_batches)) > 1:
            cut = f"{len(self.micro_batches)} of at most {_rows(max(self.micro_batches))}"
        again = f", {self.accumulated} batches" if self.accumulated > 1 else ""
        tokens = f", {self.tokens:,} tokens" if self.tokens is not None else ""
        return [
            f"{_rows(self.global_batch or 0)}{tokens} a step: {self.layout.dp}"
            f" {'replicas' if self.layout.dp > 1 else 'replica'}{again} of {_rows(self.rows or 0)},"
            f" micro-batches: {cut}"
        ]

    def _memory(self) -> list[str]:
        if self.memory is None:
            return [] if self.states is None else [self.states]
        lines = str(self.memory).splitlines()
        lines[0] = f"{lines[0]}   of each rank, {self.precision}, on {'GPUs' if self.device == 'cuda' else 'a CPU'}"
        if self.gpu_memory is not None:
            largest = self.memory.largest.total / 1e9
            fits = "fits into" if largest <= self.gpu_memory else "does not fit into"
            lines.append(f"{largest:.2f} GB at most {fits} {self.gpu_memory:g} GB, before what CUDA and fragments take")
        return lines


def readable(number: int | None) -> str:
    """A number of weights as people say it: "8.03 billion"."""
    if number is None:
        return "an unknown number of"
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,}"


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"
