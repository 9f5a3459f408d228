"""``ParallelLayout``: the parallel sizes of a run, the coordinates of its ranks, and which sizes go together.

The names are Megatron's: ``tp`` tensor, ``pp`` pipeline, ``vp`` virtual pipeline (model chunks per pipeline stage),
``cp`` context, ``ep`` expert and ``etp`` expert-tensor parallel size; ``dp``, the data-parallel size, follows from
the world size. Nothing here imports torch: a layout is checked on a laptop before any process starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from lightning_megatron.distributed import pipeline_cut
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.memory_table import MemoryTable
from lightning_megatron.distributed.suggestions import (
    choices,
    divisors,
    is_positive_int,
    nearest,
    nearest_multiples,
    not_positive,
    use,
)


class SizedModel(Protocol):
    """A model's configuration that can estimate its memory."""

    def memory(self, layout: ParallelLayout, **training: Any) -> MemoryTable:
        """Estimate the memory of a rank of each pipeline stage."""


Dimension = Literal["tp", "cp", "dp", "pp"]
# How attention reaches across the ranks that share a sequence; None is what was measured best for the shape.
ContextComm = Literal["all_gather", "all_to_all", "ring"]

# megatron-core's default order "tp-cp-ep-dp-pp", fastest first; ep does not appear in the ranks of dense layers.
_ORDER: tuple[Dimension, ...] = ("tp", "cp", "dp", "pp")


class LayoutError(ValueError):
    """Parallel sizes that do not fit; the message has the values and the nearest ones that work."""


@dataclass(frozen=True, kw_only=True)
class RankCoordinates:
    """A rank's position in each parallel dimension.

    Args:
        tp: Number of its shard of each layer.
        cp: Number of its part of each sequence.
        dp: Number of the replica that it belongs to.
        pp: Number of its pipeline stage.
        shares_sequences: Whether there is context parallelism; the text of a rank names ``cp`` only then.
    """

    tp: int
    cp: int
    dp: int
    pp: int
    shares_sequences: bool = field(default=False, repr=False, compare=False)

    def __str__(self) -> str:
        context = f"context rank {self.cp}, " if self.shares_sequences else ""
        return f"pipeline stage {self.pp}, tensor rank {self.tp}, {context}replica {self.dp}"


@answer_wrong_names
@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How the ``world_size`` ranks are divided over the parallel dimensions; checked when created, then frozen.

    Args:
        world_size: Number of ranks of the run.
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        vp: Model chunks per pipeline stage (interleaved schedule), or None for one.
        cp: Context-parallel size.
        ep: Expert-parallel size.
        etp: Expert-tensor-parallel size, or None for Megatron's default.
        sequence_parallel: Whether activations between tensor-parallel regions are sharded over the sequence. Without
            tensor parallelism it has no effect; see ``uses_sequence_parallel``.
        pipeline_split_rank: The first pipeline rank of the decoder in encoder-decoder models; with ``vp``, its first
            virtual stage, counted as in ``num_stages``. None for models with one stack, or a single stage.
        layers_per_stage: The number of layers of each stage, counted as in ``num_stages``; with ``vp`` also that of
            each pipeline rank, which its chunks share equally. Or megatron-core's text of a layout, or "auto", which a
            model's configuration replaces by numbers. None: all stages have as many.
        mtp: Layers of multi-token prediction that such a text names, which a model must have; the text says it.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    vp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False
    pipeline_split_rank: int | None = None
    layers_per_stage: Sequence[int] | str | None = None
    mtp: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_interleaving()
        self._check_split()
        self._read_cut()
        self._check_world()
        self._check_expert_ranks()

    @classmethod
    def of_smallest_world(cls, **sizes: Any) -> ParallelLayout:
        """Make the layout of as few copies of the model as it can have, to check the sizes; with ``vp``, of two stages.

        Raises:
            LayoutError: The sizes do not fit any world size.
        """
        known = {name: size for name, size in sizes.items() if is_positive_int(size)}
        tp, pp, cp, ep = (int(known.get(name, 1)) for name in ("tp", "pp", "cp", "ep"))
        etp = int(known.get("etp", tp))
        interleaved = sizes.get("vp") is not None and sizes.get("pp") == 1
        return cls(world_size=pp * math.lcm(tp * cp, etp * ep) * (2 if interleaved else 1), **sizes)

    @property
    def num_model_ranks(self) -> int:
        """The number of ranks that hold one copy of the model together."""
        return self.tp * self.pp * self.cp

    @property
    def dp(self) -> int:
        """The data-parallel size, which is the number of copies of the model."""
        return self.world_size // self.num_model_ranks

    @property
    def expert_tp(self) -> int:
        """The number of ranks that share each expert: ``etp``, or the tensor-parallel size as in Megatron."""
        return self.tp if self.etp is None else self.etp

    @property
    def experts_are_divided(self) -> bool:
        """Whether other ranks hold copies of an expert's weights than of a dense layer's."""
        return self.ep > 1 or self.expert_tp != self.tp

    @property
    def replicas_share_experts(self) -> bool:
        """Whether a pass needs several replicas, because they hold experts together."""
        return self.dp > 1 and self.tp * self.cp % (self.ep * self.expert_tp) != 0

    @property
    def expert_dp(self) -> int:
        """The number of copies of each expert."""
        return self.world_size // (self.expert_tp * self.ep * self.pp)

    @property
    def sizes(self) -> str:
        """The sizes as people read them, such as "tp=2, pp=4, vp=2, dp=8"; cp, ep and etp where they say more.

        Layers that are cut unevenly follow as ``layers_per_stage``.
        """
        cp, ep = (size if size > 1 else None for size in (self.cp, self.ep))
        etp = self.expert_tp if self.experts_are_divided and self.expert_tp != self.tp else None
        sizes = {"tp": self.tp, "pp": self.pp, "vp": self.vp, "cp": cp, "dp": self.dp, "ep": ep, "etp": etp}
        if self.pp > 1:
            sizes["layers_per_stage"] = _as_written(self.layers_per_stage)
        return ", ".join(f"{name}={size}" for name, size in sizes.items() if size is not None)

    @property
    def num_stages(self) -> int:
        """The number of virtual pipeline stages: stage ``i`` is chunk ``i // pp`` of pipeline rank ``i % pp``."""
        return self.pp * (self.vp or 1)

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether sequence parallelism has an effect; megatron-core's configs refuse it with tp=1."""
        return self.sequence_parallel and self.tp > 1

    @property
    def microbatch_multiple(self) -> int:
        """The number that the number of micro-batches must be a multiple of.

        The interleaved schedule takes micro-batches in groups of ``pp``
        (``megatron.core.pipeline_parallel.schedules.forward_backward_pipelining_with_interleaving``).
        """
        return 1 if self.vp is None else self.pp

    def coordinates(self, rank: int) -> RankCoordinates:
        """Return the coordinates of ``rank``, in megatron-core's default order (tp fastest, pp slowest)."""
        self._check_rank(rank)
        numbers = {kind: rank // self._stride(kind) % self._size(kind) for kind in _ORDER}
        return RankCoordinates(**numbers, shares_sequences=self.cp > 1)

    def rank_name(self, rank: int) -> str:
        """Return a rank's number and coordinates, for people."""
        return f"rank {rank} ({self.coordinates(rank)})"

    def group(self, kind: Dimension, rank: int) -> list[int]:
        """Return the ranks, in order, that differ from ``rank`` in the dimension ``kind`` only; ``rank`` is one."""
        self._check_rank(rank)
        stride, size = self._stride(kind), self._size(kind)
        first = rank - rank // stride % size * stride
        return [first + index * stride for index in range(size)]

    def padded_vocab_size(self, vocab_size: int, divisible_by: int = 128) -> int:
        """Return the smallest multiple of ``divisible_by * tp`` that holds ``vocab_size`` tokens.

        Megatron-LM's rule (``_vocab_size_with_padding`` in ``megatron/training/tokenizer``): each tensor-parallel
        rank's shard of the embedding is a multiple of ``divisible_by``.
        """
        self._check_positive(vocab_size=vocab_size, divisible_by=divisible_by)
        multiple = divisible_by * self.tp
        return -(-vocab_size // multiple) * multiple

    def memory(self, config: SizedModel, **training: Any) -> MemoryTable:
        """Estimate the memory that training takes on a rank of each pipeline stage, before anything is built.

        ``str`` of it is a table in GB. Bytes of the states follow ZeRO (arXiv 1910.02054), those of the activations
        Korthikanti and others (arXiv 2205.05198); ``lightning_megatron/models/activation_memory.py`` has the formulas.

        Args:
            config: The configuration of a module, such as a ``GPTConfig``.
            **training: ``micro_batch_size`` (1), ``num_microbatches`` (enough to fill the pipeline), ``precision``
                ("bf16-mixed"), ``recompute``, ``distributed_optimizer`` (True), ``kernels``, ``cp_comm`` (the best for
                the shape), ``lengths`` (the longest), ``optimizer`` (what the module has), ``optimizer_states`` (2,
                those of Adam), ``device`` ("cuda"), ``lora`` (None: all weights are trained).

        Raises:
            LayoutError: The layout cannot divide the model.
            ValueError: A value of ``training`` is wrong.
        """
        return config.memory(self, **training)

    def check_num_microbatches(self, num_microbatches: int) -> None:
        """Check that the pipeline schedule can run ``num_microbatches``."""
        if not is_positive_int(num_microbatches):
            raise self.error(not_positive("num_microbatches", num_microbatches, smallest=self.microbatch_multiple))
        if num_microbatches % self.microbatch_multiple:
            nearest = nearest_multiples(num_microbatches, self.microbatch_multiple)
            raise self.error(
                f"num_microbatches={num_microbatches} is not a multiple of pp={self.pp}, which vp={self.vp} needs. "
                f"{use(choices('num_microbatches', nearest), 'vp=None')}"
            )

    def legal_num_microbatches(self, batch_size: int, at_most: int) -> int:
        """Return the largest number of micro-batches up to ``at_most`` that cuts the batch evenly and is legal.

        Args:
            batch_size: Samples of one data-parallel rank's batch.
            at_most: The largest number wanted, for instance ``4 * pp``.
        """
        self._check_positive(batch_size=batch_size, at_most=at_most)
        multiple = self.microbatch_multiple
        legal = [n for n in divisors(batch_size) if n <= at_most and n % multiple == 0]
        if legal:
            return legal[-1]
        batch_sizes = nearest_multiples(batch_size, multiple) if batch_size % multiple else []
        limits = [multiple] if at_most < multiple else []
        both = " with " if batch_sizes and limits else ""
        raise self.error(
            f"batch_size={batch_size} cannot be cut into at most {at_most} micro-batches whose number is a multiple "
            f"of pp={self.pp}, which vp={self.vp} needs. "
            f"{use(choices('batch_size', batch_sizes) + both + choices('at_most', limits), 'vp=None')}"
        )

    def check_batch(self, batch_size: int, micro_batch_size: int) -> None:
        """Check that one data-parallel rank's batch is a legal number of micro-batches of ``micro_batch_size``."""
        self._check_positive(batch_size=batch_size, micro_batch_size=micro_batch_size)
        unit = micro_batch_size * self.microbatch_multiple
        if batch_size % unit:
            interleaved = f" × pp={self.pp}, which vp={self.vp} needs" if self.vp else ""
            legal = [m for m in divisors(batch_size) if batch_size // m % self.microbatch_multiple == 0]
            raise self.error(
                f"batch_size={batch_size} is not a multiple of micro_batch_size={micro_batch_size}{interleaved}. "
                + use(
                    choices("micro_batch_size", nearest(micro_batch_size, legal)),
                    choices("batch_size", nearest_multiples(batch_size, unit)),
                )
            )

    def _size(self, kind: str) -> int:
        return {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}[kind]

    def _stride(self, kind: Dimension) -> int:
        return math.prod(self._size(faster) for faster in _ORDER[: _ORDER.index(kind)])

    def _check_types(self) -> None:
        self._check_positive(world_size=self.world_size, tp=self.tp, pp=self.pp, cp=self.cp, ep=self.ep)
        self._check_positive(**{name: size for name in ("vp", "etp") if (size := getattr(self, name)) is not None})
        if not isinstance(self.sequence_parallel, bool):
            raise self.error(f"sequence_parallel={self.sequence_parallel!r} is not a bool. Use True or False.")

    def _check_positive(self, **sizes: object) -> None:
        for name, size in sizes.items():
            if not is_positive_int(size):
                raise self.error(not_positive(name, size))

    def _check_interleaving(self) -> None:
        if self.vp == 1:
            raise self.error("vp=1 is one model chunk per stage, which is no interleaving. Use vp=None.")
        if self.vp is not None and self.pp == 1:
            smallest = choices("pp", self.legal_sizes("pp")[:1])
            raise self.error(f"vp={self.vp} interleaves pipeline stages, but pp=1. {use(smallest, 'vp=None')}")

    def _check_split(self) -> None:
        split, stages = self.pipeline_split_rank, self.num_stages
        if split is None or (is_positive_int(split) and split < stages):
            return
        some = "1" if stages == 2 else f"1 to {stages - 1}"
        raise self.error(
            f"of {stages} pipeline stages in all, both sides of an encoder-decoder model need one. "
            + use("pp=2 or more, or leave it out" if stages == 1 else f"pipeline_split_rank={some}")
        )

    def _read_cut(self) -> None:
        """Keep the numbers of layers as a tuple, whatever form they were given in."""
        given = self.layers_per_stage
        try:
            cut = pipeline_cut.read(given, self.pp, self.vp)
        except ValueError as error:
            raise self.error(str(error)) from None
        if isinstance(given, str) and given != "auto":
            object.__setattr__(self, "mtp", pipeline_cut.later_layers(given))
        object.__setattr__(self, "layers_per_stage", cut)

    def _check_world(self) -> None:
        if self.world_size % self.num_model_ranks == 0:
            return
        product = " × ".join(str(size) for size in (self.tp, self.pp, self.cp) if size > 1)
        ranks = f"{product} = {self.num_model_ranks}" if " × " in product else product
        changeable = ("tp", "pp") if self.cp == 1 else ("tp", "pp", "cp")
        alternatives = [choices(kind, nearest(self._size(kind), self.legal_sizes(kind))) for kind in changeable]
        worlds = " or ".join(map(str, nearest_multiples(self.world_size, self.num_model_ranks)))
        raise self.error(
            f"{ranks} ranks do not divide the world of {self.world_size}. {use(*alternatives, f'{worlds} devices')}"
        )

    def _check_expert_ranks(self) -> None:
        """The ranks of a pipeline stage are divided anew for experts: etp fastest, then ep, then their copies."""
        ranks, unit = self.world_size // self.pp, self.expert_tp * self.ep
        if ranks % unit == 0:
            return
        present = {"ep": self.ep, "etp": self.expert_tp}
        fitting = [choices(name, nearest(size, self.legal_sizes(name))) for name, size in present.items()]
        worlds = " or ".join(str(size * self.pp) for size in nearest_multiples(ranks, unit))
        raise self.error(
            f"etp={self.expert_tp} × ep={self.ep} ranks do not divide the {ranks} ranks of a pipeline stage."
            f" {use(*fitting, f'{worlds} devices')}"
        )

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise self.error(f"rank={rank} is not in the world of {self.world_size}. Use 0 to {self.world_size - 1}.")

    def legal_sizes(self, kind: str) -> list[int]:
        """List the values of ``kind`` that this world allows while the other sizes stay."""
        if kind in ("ep", "etp"):
            ranks, other = self.world_size // self.pp, self.expert_tp if kind == "ep" else self.ep
            return [size for size in divisors(ranks) if ranks % (size * other) == 0]
        others = self.num_model_ranks // self._size(kind)
        if self.world_size % others:
            return []
        smallest = 2 if kind == "pp" and self.vp is not None else 1
        sizes = [size for size in divisors(self.world_size // others) if size >= smallest]
        return [size for size in sizes if self._leaves_experts_whole(kind, size)]

    def _leaves_experts_whole(self, kind: str, size: int) -> bool:
        """Whether the ranks of a pipeline stage can still be divided for experts when ``kind`` is ``size``."""
        sizes = {"pp": self.pp, "tp": self.tp, kind: size}
        etp = sizes["tp"] if self.etp is None else self.etp
        return self.world_size // sizes["pp"] % (etp * self.ep) == 0

    def error(self, text: str) -> LayoutError:
        """Make an error that begins with the strategy as the user wrote it."""
        said = (f for f in fields(self) if f.name not in ("world_size", "mtp"))
        changed = (f for f in said if getattr(self, f.name) != f.default)
        call = ", ".join(f"{field.name}={_as_written(getattr(self, field.name))!r}" for field in changed)
        return LayoutError(f"MegatronStrategy({call}): {text}")


def _as_written(value: Any) -> Any:
    """A value as people write it: a list for a tuple."""
    return list(value) if isinstance(value, tuple) else value
