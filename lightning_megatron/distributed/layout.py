"""The sizes of a parallel run: who sits where, what divides what, and what to change when it does not.

The names are Megatron's: ``tp`` tensor, ``pp`` pipeline, ``vp`` virtual pipeline (model chunks per pipeline stage),
``cp`` context, ``ep`` expert and ``etp`` expert-tensor parallel size; ``dp``, the data-parallel size, follows from
the world size. Nothing here imports torch: a layout is checked on a laptop before any process starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple

# Dimensions whose layers do not exist yet. Deleting a line here is what switches a dimension on.
_UNBUILT = {"cp": "context parallelism", "ep": "expert parallelism", "etp": "expert tensor parallelism"}

Dimension = Literal["tp", "cp", "dp", "pp"]

# megatron-core's default order "tp-cp-ep-dp-pp", fastest first; ep does not appear in the ranks of dense layers.
_ORDER: tuple[Dimension, ...] = ("tp", "cp", "dp", "pp")


class LayoutError(ValueError):
    """A size that does not fit; the message has the values seen and the nearest ones that work."""


@dataclass(frozen=True, kw_only=True)
class RankCoordinates:
    """Where one rank sits in each dimension."""

    tp: int
    cp: int
    dp: int
    pp: int


class _Rule(NamedTuple):
    """A model's ``name`` must be a multiple of ``unit``; a change to any one of ``changeable`` can mend it."""

    name: str
    unit: int
    unit_text: str
    changeable: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How ``world_size`` ranks are shared out; checked when it is made, frozen afterwards.

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
        pipeline_split_rank: Of encoder-decoder models, the decoder's first pipeline rank; with ``vp``, its first
            virtual stage, counted as ``num_stages`` counts them. None: there is one stack, or one stage.
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

    def __post_init__(self) -> None:
        self._check_types()
        self._check_built()
        self._check_interleaving()
        self._check_split()
        self._check_world()

    @classmethod
    def of_smallest_world(cls, **sizes: Any) -> ParallelLayout:
        """The layout of one copy of the model (with ``vp`` of two stages at least): it checks all but the world.

        Raises:
            LayoutError: Sizes that are wrong in every world.
        """
        known = [size for name in ("tp", "pp", "cp") if _is_positive_int(size := sizes.get(name, 1))]
        interleaved = sizes.get("vp") is not None and sizes.get("pp") == 1
        return cls(world_size=math.prod(known) * (2 if interleaved else 1), **sizes)

    @property
    def num_model_ranks(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.tp * self.pp * self.cp

    @property
    def dp(self) -> int:
        """Data-parallel size: copies of the model."""
        return self.world_size // self.num_model_ranks

    @property
    def num_stages(self) -> int:
        """Pipeline stages, virtual ones included: stage ``i`` is chunk ``i // pp`` of pipeline rank ``i % pp``."""
        return self.pp * (self.vp or 1)

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether sequence parallelism has an effect; megatron-core's configs raise when told so with tp=1."""
        return self.sequence_parallel and self.tp > 1

    @property
    def microbatch_multiple(self) -> int:
        """What the number of micro-batches must be a multiple of.

        The interleaved schedule takes micro-batches in groups of ``pp``
        (``megatron.core.pipeline_parallel.schedules.forward_backward_pipelining_with_interleaving``).
        """
        return 1 if self.vp is None else self.pp

    def coordinates(self, rank: int) -> RankCoordinates:
        """Return where ``rank`` sits, in megatron-core's default order (tp fastest, pp slowest)."""
        self._check_rank(rank)
        return RankCoordinates(**{kind: rank // self._stride(kind) % self._size(kind) for kind in _ORDER})

    def group(self, kind: Dimension, rank: int) -> list[int]:
        """Return the ranks, in order, that differ from ``rank`` in the dimension ``kind`` only; ``rank`` is one."""
        self._check_rank(rank)
        stride, size = self._stride(kind), self._size(kind)
        first = rank - rank // stride % size * stride
        return [first + index * stride for index in range(size)]

    def check_model(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        ffn_hidden_size: int,
        num_attention_heads: int,
        num_query_groups: int,
        vocab_size: int | None = None,
        seq_length: int | None = None,
        uneven_stages: bool = False,
    ) -> None:
        """Check that a transformer can be cut along this layout.

        Args:
            num_layers: Transformer layers of the whole model.
            hidden_size: Width of the residual stream.
            ffn_hidden_size: Inner width of the MLP.
            num_attention_heads: Query heads.
            num_query_groups: Key-value heads.
            vocab_size: Tokens before padding; any positive number, as ``padded_vocab_size`` makes it fit.
            seq_length: Tokens of a sequence, or None to leave it unchecked.
            uneven_stages: Whether the stages of the pipeline may differ in their number of layers.

        Raises:
            LayoutError: With one line for each rule that is broken.
        """
        sizes = {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "ffn_hidden_size": ffn_hidden_size,
            "num_attention_heads": num_attention_heads,
            "num_query_groups": num_query_groups,
            "vocab_size": vocab_size,
            "seq_length": seq_length,
        }
        model = {name: size for name, size in sizes.items() if size is not None}
        lines = [_not_positive(name, size) for name, size in model.items() if not _is_positive_int(size)]
        if not lines:
            lines = self._model_lines(model, uneven_stages)
        if lines:
            raise self._error("the model does not fit.\n  " + "\n  ".join(lines))

    def padded_vocab_size(self, vocab_size: int, divisible_by: int = 128) -> int:
        """Return the smallest multiple of ``divisible_by * tp`` that holds ``vocab_size`` tokens.

        Megatron-LM's rule (``_vocab_size_with_padding`` in ``megatron/training/tokenizer``): each tensor-parallel
        rank's shard of the embedding is a multiple of ``divisible_by``.
        """
        self._check_positive(vocab_size=vocab_size, divisible_by=divisible_by)
        multiple = divisible_by * self.tp
        return -(-vocab_size // multiple) * multiple

    def check_num_microbatches(self, num_microbatches: int) -> None:
        """Check that the pipeline schedule can run ``num_microbatches``."""
        if not _is_positive_int(num_microbatches):
            raise self._error(_not_positive("num_microbatches", num_microbatches, smallest=self.microbatch_multiple))
        if num_microbatches % self.microbatch_multiple:
            nearest = _nearest_multiples(num_microbatches, self.microbatch_multiple)
            raise self._error(
                f"num_microbatches={num_microbatches} is not a multiple of pp={self.pp}, which vp={self.vp} needs. "
                f"{_use(_choices('num_microbatches', nearest), 'vp=None')}"
            )

    def legal_num_microbatches(self, batch_size: int, at_most: int) -> int:
        """Return the largest number of micro-batches up to ``at_most`` that cuts the batch evenly and is legal.

        Args:
            batch_size: Samples of one data-parallel rank's batch.
            at_most: The largest number wanted, for instance ``4 * pp``.
        """
        self._check_positive(batch_size=batch_size, at_most=at_most)
        multiple = self.microbatch_multiple
        legal = [n for n in _divisors(batch_size) if n <= at_most and n % multiple == 0]
        if legal:
            return legal[-1]
        batch_sizes = _nearest_multiples(batch_size, multiple) if batch_size % multiple else []
        limits = [multiple] if at_most < multiple else []
        both = " with " if batch_sizes and limits else ""
        raise self._error(
            f"batch_size={batch_size} cannot be cut into at most {at_most} micro-batches whose number is a multiple "
            f"of pp={self.pp}, which vp={self.vp} needs. "
            f"{_use(_choices('batch_size', batch_sizes) + both + _choices('at_most', limits), 'vp=None')}"
        )

    def check_batch(self, batch_size: int, micro_batch_size: int) -> None:
        """Check that one data-parallel rank's batch is a legal number of micro-batches of ``micro_batch_size``."""
        self._check_positive(batch_size=batch_size, micro_batch_size=micro_batch_size)
        unit = micro_batch_size * self.microbatch_multiple
        if batch_size % unit:
            interleaved = f" × pp={self.pp}, which vp={self.vp} needs" if self.vp else ""
            legal = [m for m in _divisors(batch_size) if batch_size // m % self.microbatch_multiple == 0]
            raise self._error(
                f"batch_size={batch_size} is not a multiple of micro_batch_size={micro_batch_size}{interleaved}. "
                + _use(
                    _choices("micro_batch_size", _nearest(micro_batch_size, legal)),
                    _choices("batch_size", _nearest_multiples(batch_size, unit)),
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
            raise self._error(f"sequence_parallel={self.sequence_parallel!r} is not a bool. Use True or False.")

    def _check_positive(self, **sizes: object) -> None:
        for name, size in sizes.items():
            if not _is_positive_int(size):
                raise self._error(_not_positive(name, size))

    def _check_built(self) -> None:
        for name, title in _UNBUILT.items():
            if (getattr(self, name) or 1) > 1:
                raise self._error(
                    f"{title} ({name}) of {getattr(self, name)} is refused, its layers do not exist yet. Use {name}=1."
                )

    def _check_interleaving(self) -> None:
        if self.vp == 1:
            raise self._error("vp=1 is one model chunk per stage, which is no interleaving. Use vp=None.")
        if self.vp is not None and self.pp == 1:
            smallest = _choices("pp", self._legal_sizes("pp")[:1])
            raise self._error(f"vp={self.vp} interleaves pipeline stages, but pp=1. {_use(smallest, 'vp=None')}")

    def _check_split(self) -> None:
        split, stages = self.pipeline_split_rank, self.num_stages
        if split is None or (_is_positive_int(split) and split < stages):
            return
        some = "1" if stages == 2 else f"1 to {stages - 1}"
        raise self._error(
            f"of {stages} pipeline stages in all, both sides of an encoder-decoder model need one. "
            + _use("pp=2 or more, or leave it out" if stages == 1 else f"pipeline_split_rank={some}")
        )

    def _check_world(self) -> None:
        if self.world_size % self.num_model_ranks == 0:
            return
        product = " × ".join(str(size) for size in (self.tp, self.pp, self.cp) if size > 1)
        ranks = f"{product} = {self.num_model_ranks}" if " × " in product else product
        alternatives = [_choices(kind, _nearest(self._size(kind), self._legal_sizes(kind))) for kind in ("tp", "pp")]
        worlds = " or ".join(map(str, _nearest_multiples(self.world_size, self.num_model_ranks)))
        raise self._error(
            f"{ranks} ranks do not divide the world of {self.world_size}. {_use(*alternatives, f'{worlds} devices')}"
        )

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise self._error(f"rank={rank} is not in the world of {self.world_size}. Use 0 to {self.world_size - 1}.")

    def _legal_sizes(self, kind: str) -> list[int]:
        """List the values of ``kind`` that this world allows while the other sizes stay."""
        others = self.num_model_ranks // self._size(kind)
        if self.world_size % others:
            return []
        smallest = 2 if kind == "pp" and self.vp is not None else 1
        return [size for size in _divisors(self.world_size // others) if size >= smallest]

    def _error(self, text: str) -> LayoutError:
        """Make an error that begins with the strategy as the user wrote it."""
        changed = (f for f in fields(self) if f.name != "world_size" and getattr(self, f.name) != f.default)
        call = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in changed)
        return LayoutError(f"MegatronStrategy({call}): {text}")

    def _broken_rules(self, model: Mapping[str, int], uneven_stages: bool) -> list[_Rule]:
        """List the rules that ``model`` breaks.

        Sources: ``TransformerConfig.__post_init__`` and ``Attention.__init__`` (heads and query groups),
        ``ColumnParallelLinear`` and ``RowParallelLinear`` (widths), ``scatter_to_sequence_parallel_region`` and
        ``get_batch_on_this_cp_rank`` (sequence), all of megatron-core 0.16.1. One rule is stricter than Megatron,
        which also takes ``tp`` as a multiple of the query groups and then gathers QKV over the tensor-parallel ranks.
        """
        tp, heads, groups = self.tp, model["num_attention_heads"], model["num_query_groups"]
        rules = [
            _Rule("hidden_size", tp, f"tp={tp}", ("hidden_size", "tp")),
            _Rule("ffn_hidden_size", tp, f"tp={tp}", ("ffn_hidden_size", "tp")),
            _Rule("num_attention_heads", tp, f"tp={tp}", ("num_attention_heads", "tp")),
            _Rule("hidden_size", heads, f"num_attention_heads={heads}", ("hidden_size", "num_attention_heads")),
        ]
        if groups != heads:
            changeable = ("num_attention_heads", "num_query_groups")
            rules.append(_Rule("num_query_groups", tp, f"tp={tp}", ("num_query_groups", "tp")))
            rules.append(_Rule("num_attention_heads", groups, f"num_query_groups={groups}", changeable))
        if not uneven_stages:
            text = f"pp={self.pp}" if self.vp is None else f"pp={self.pp} × vp={self.vp}"
            rules.append(_Rule("num_layers", self.num_stages, text, ("num_layers", "pp")))
        if "seq_length" in model and self.uses_sequence_parallel:
            text = f"tp={tp}" if self.cp == 1 else f"tp={tp} × cp={self.cp}"
            rules.append(_Rule("seq_length", tp * self.cp, f"{text} under sequence_parallel", ("seq_length", "tp")))
        if "seq_length" in model and self.cp > 1:
            rules.append(_Rule("seq_length", 2 * self.cp, f"2 × cp={self.cp}", ("seq_length",)))
        return [rule for rule in rules if model[rule.name] % rule.unit]

    def _model_lines(self, model: Mapping[str, int], uneven_stages: bool) -> list[str]:
        """Write one line for each broken rule."""
        broken = self._broken_rules(model, uneven_stages)

        def mends(name: str, size: int) -> bool:
            return len(self._broken_rules(_changed(model, name, size), uneven_stages)) < len(broken)

        def fits(kind: str, size: int) -> bool:
            layout = replace(self, tp=size) if kind == "tp" else replace(self, pp=size)
            return not any(kind in rule.changeable for rule in layout._broken_rules(model, uneven_stages))

        def choices(name: str, rule: _Rule) -> str:
            if name in ("tp", "pp"):
                return _choices(name, _nearest(self._size(name), self._legal_sizes(name), partial(fits, name)))
            sizes = _nearest(model[name], _candidates(model, name, rule), partial(mends, name))
            return _choices(_label(model, name), sizes)

        return [
            f"{_label(model, rule.name)}={model[rule.name]} is not a multiple of {rule.unit_text}. "
            + _use(*(choices(name, rule) for name in rule.changeable))
            for rule in broken
        ]


def _candidates(model: Mapping[str, int], name: str, rule: _Rule) -> Sequence[int]:
    """List, in rising order, the values of the model's ``name`` that mend ``rule``, up to where they repeat."""
    if name != rule.name:
        return _divisors(model[rule.name])
    return range(rule.unit, model[name] + rule.unit * (model["hidden_size"] + 1), rule.unit)


def _is_multi_head(model: Mapping[str, int]) -> bool:
    """Whether each query head has its own keys and values, so that both numbers change together."""
    return model["num_attention_heads"] == model["num_query_groups"]


def _changed(model: Mapping[str, int], name: str, size: int) -> dict[str, int]:
    both = name == "num_attention_heads" and _is_multi_head(model)
    return {**model, name: size, **({"num_query_groups": size} if both else {})}


def _label(model: Mapping[str, int], name: str) -> str:
    return f"{name}=num_query_groups" if name == "num_attention_heads" and _is_multi_head(model) else name


def _is_positive_int(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def _not_positive(name: str, size: object, smallest: int = 1) -> str:
    return f"{name}={size!r} is not a positive integer. Use {name}={smallest} or more."


def _divisors(size: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return sorted({*small, *(size // d for d in small)})


def _nearest_multiples(size: int, unit: int) -> list[int]:
    """Return the multiples of ``unit`` next below and next above ``size``; below is left out where it is 0."""
    below = (size - 1) // unit * unit
    return [multiple for multiple in (below, size // unit * unit + unit) if multiple > 0]


def _nearest(size: int, candidates: Sequence[int], works: Callable[[int], bool] = bool) -> list[int]:
    """Return the candidates (in rising order) next below and next above ``size`` that work."""
    below = next((c for c in reversed(candidates) if c < size and works(c)), None)
    above = next((c for c in candidates if c > size and works(c)), None)
    return [c for c in (below, above) if c is not None]


def _choices(name: str, sizes: Sequence[int]) -> str:
    return " or ".join(f"{name}={size}" for size in sizes)


def _use(*alternatives: str) -> str:
    """Write the closing advice; alternatives that have nothing to offer are empty and left out."""
    return f"Use {', or '.join(filter(None, alternatives))}."
