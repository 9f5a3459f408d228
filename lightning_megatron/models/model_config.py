"""``ModelConfig``: what every family's configuration has, and what sizes follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.distributed.memory_table import MemoryTable
from lightning_megatron.distributed.model_fit import check_model
from lightning_megatron.distributed.suggestions import did_you_mean
from lightning_megatron.distributed.wrong_names import further_tables, unknown_name
from lightning_megatron.models import core_config, expert_sizes, parameter_counts
from lightning_megatron.models.core_fields import core_fields
from lightning_megatron.models.parameter_counts import Part
from lightning_megatron.models.pipeline_stages import with_stages
from lightning_megatron.models.recompute import Recompute
from lightning_megatron.models.refused_fields import refuse_fields

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from lightning_megatron.models.build_settings import BuildSettings

LayerBackend = Literal["torch", "transformer_engine"]
Activation = Literal[
    "gelu", "gelu_tanh", "relu", "squared_relu", "silu", "swiglu", "geglu", "geglu_tanh", "quick_geglu"
]

# Kinds of rotary frequencies that do not depend on the length of the input, by transformers' formulas.
ROPE_TYPES = ("linear", "llama3", "yarn")
GATED = ("swiglu", "geglu", "geglu_tanh", "quick_geglu")


class LayerStack(NamedTuple):
    """What the layers of a stack do with one sequence.

    Attributes:
        layers: The number of layers.
        tokens: The tokens that go through each of them.
        attention: For each attention of a layer, the keys that there are and those that a query sees on average.
    """

    layers: int
    tokens: int
    attention: list[tuple[int, float]]


@dataclass(kw_only=True)
class ModelConfig:
    """The shape of a transformer, whatever its family.

    Args:
        num_layers: Transformer layers.
        hidden_size: Width of the hidden states.
        num_attention_heads: Query heads.
        vocab_size: Token ids that occur; the embedding is padded to a multiple of
            ``make_vocab_size_divisible_by · tp``. None: the data module's.
        seq_length: Longest sequence, in tokens. None: the data module's.
        ffn_hidden_size: Width of the feed-forward layer. None: four times ``hidden_size``.
        kv_channels: Size of a head. None: ``hidden_size / num_attention_heads``.
        layernorm_epsilon: Added to the variance.
        activation: Activation of the feed-forward layer; "swiglu", "geglu", "geglu_tanh" and "quick_geglu" (by
            ``x · sigmoid(1.702 x)``) are gated.
        hidden_dropout: Dropout after the embedding, attention and feed-forward.
        attention_dropout: Dropout of attention weights.
        init_method_std: Standard deviation of the initial weights.
        make_vocab_size_divisible_by: Unit of the padded vocabulary, see ``vocab_size``.
        layers: "torch", or "transformer_engine" where it is installed.
        extra: Further fields of megatron-core's ``TransformerConfig``, by its names; they win over what is above.

    Raises:
        LayoutError: Sizes that fit no layout, such as heads that do not divide ``hidden_size``.
        ValueError: An unknown activation, kind of layers, or key of ``extra``; a probability that is none; a field of
            ``extra`` that needs Apex or Transformer Engine, with what to use instead.
    """

    kind: ClassVar[str] = ""  # a name, by which a family is found; each has its own

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int = None  # type: ignore[assignment]  # the data module's; a number once the model is built
    seq_length: int = None  # type: ignore[assignment]  # so is this
    ffn_hidden_size: int | None = None
    kv_channels: int | None = None
    layernorm_epsilon: float = 1e-5
    activation: Activation = "gelu"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    make_vocab_size_divisible_by: int = 128
    layers: LayerBackend = "torch"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse choices that do not exist."""
        self._one_of("activation", self.activation, get_args(Activation))
        self._one_of("layers", self.layers, get_args(LayerBackend))
        arguments = Arguments(type(self).__name__)
        sizes = ("hidden_size", "num_attention_heads", "make_vocab_size_divisible_by")
        arguments.whole(**{name: getattr(self, name) for name in sizes})
        arguments.whole(**self.depths())
        optional = {
            name: getattr(self, name) for name in ("vocab_size", "seq_length", "ffn_hidden_size", "kv_channels")
        }
        arguments.whole(optional=True, **optional)
        arguments.number(least=0, layernorm_epsilon=self.layernorm_epsilon, init_method_std=self.init_method_std)
        arguments.kind(dict, "a dictionary of TransformerConfig's fields", extra=self.extra)
        for key in self.extra:
            self._one_of("extra key", key, core_fields())
        if self.layers == "torch":
            has_bias = self.family_arguments().get("add_bias_linear", True)
            refuse_fields(type(self).__name__, self.extra, self.activation, has_bias)
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(
                    f"{type(self).__name__}({name}={getattr(self, name)}): use a probability, from 0 to below 1."
                )
        self.check(ParallelLayout(world_size=1))

    @classmethod
    def of_own_model(cls, **fields_by_name: Any) -> ModelConfig:
        """The configuration of a model without a vocabulary, from its fields and from megatron-core's, beside another.

        Raises:
            ValueError: No such field; or a value is wrong.
        """
        own = {each.name for each in fields(cls)} - {"vocab_size", "seq_length", "extra", "layers"}
        extra = {name: value for name, value in fields_by_name.items() if name not in own}
        known = [*own, *core_fields()]
        for name in extra:
            if name not in known:
                raise ValueError(f"transformer_config({name}=...): no such field.{did_you_mean(name, known)}")
        ours = {name: value for name, value in fields_by_name.items() if name in own}
        return cls(vocab_size=1, seq_length=1, extra=extra, **ours)

    def stacks(self, lengths: tuple[int, ...]) -> list[LayerStack]:
        """The stacks of layers that a sequence goes through, from the input to the logits; one, which sees all of it.

        Args:
            lengths: Tokens of the sequence; a T5 has two numbers: encoder and decoder.
        """
        (length,) = lengths
        return [LayerStack(self.num_layers, length, [(length, length)])]

    def layer_work(self, stack: LayerStack, number: int) -> tuple[float | None, int]:
        """What a layer has that others may not have: a window of attention, and experts.

        Args:
            stack: The stack of layers.
            number: The layer's number in it, from 0.

        Returns:
            The keys that a query sees on average, or None where it is as ``stack`` says; and how many weights of the
            feed-forward layer each token is multiplied with.
        """
        return None, (3 if self.is_gated else 2) * self.hidden_size * (self.ffn_hidden_size or 4 * self.hidden_size)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The longest sequence, in tokens; of a T5, of both sides."""
        return (self.seq_length,)

    def memory(self, layout: ParallelLayout, **training: Any) -> MemoryTable:
        """The memory that training takes under ``layout``; the same as ``layout.memory(config, ...)``.

        Args:
            layout: The parallel sizes.
            **training: As ``lightning_megatron.models.memory_settings.Training`` has them.

        Raises:
            LayoutError: ``layout`` cannot divide the sizes.
            ValueError: A value of ``training`` is wrong.
        """
        import torch

        from lightning_megatron.models.build_settings import BuildSettings
        from lightning_megatron.models.kernels import Kernels
        from lightning_megatron.models.memory_estimate import estimate
        from lightning_megatron.models.memory_settings import Training

        run = Training(**training)
        layout = self.complete_layout(layout, run.recompute)
        self.check(layout)
        device = torch.device(run.device)
        kernels = (run.kernels or Kernels()).on(device)
        settings = BuildSettings(layout=layout, recompute=run.recompute, kernels=kernels, device=device)
        always = ModelConfig.keeps_scores(self, settings)
        scores = self.keeps_scores(settings) if run.lora is None else always, always  # a frozen bias has no gradient
        return estimate(self, layout, replace(run, kernels=kernels), self.recomputed_modules(settings), scores)

    # What the estimate of the memory asks; a family says where it differs

    stack_names: ClassVar[tuple[str, ...]] = ("decoder",)  # megatron-core's
    final_norms: ClassVar[int] = 1  # behind a stack
    outputs_are_sharded: ClassVar[bool] = True  # over the tensor-parallel ranks
    share_of_counted_tokens: ClassVar[float] = 1.0  # in the loss

    def chunks(self, layout: ParallelLayout) -> list[list[Part]]:
        """The layers of each model chunk, in the order of the virtual stages."""
        return parameter_counts.chunks(self.num_layers, self.complete_layout(layout), self.final_norms > 0)

    def parameters(self, layout: ParallelLayout, chunk: list[Part]) -> int:
        """The weights of a chunk on a tensor-parallel rank."""
        total = 0
        for part in chunk:
            with_experts = expert_sizes.layers_with_experts(self, part)
            attentions = len(self.stacks(self.lengths)[part.stack].attention)
            total += part.layers * parameter_counts.layer(self, layout, attentions)
            if with_experts:
                instead = expert_sizes.layer_weights(self, layout) - parameter_counts.feed_forward(self, layout)
                total += with_experts * instead
            total += part.ends_stack * parameter_counts.norm(self)
        embeds = any(part.embeds for part in chunk)
        total += self.embedding_parameters(layout) if embeds else 0
        return total + (self.head_parameters(layout, embeds) if any(part.ends_model for part in chunk) else 0)

    def embedding_parameters(self, layout: ParallelLayout) -> int:
        """The weights of what comes before the layers, on a tensor-parallel rank."""
        return parameter_counts.vocabulary(self, layout)

    def head_parameters(self, layout: ParallelLayout, embeds: bool) -> int:
        """The weights of what comes behind the last norm, on a tensor-parallel rank.

        Args:
            layout: The parallel sizes.
            embeds: Whether the embedding is on the same stage, so that an output layer that is tied to it has no copy.
        """
        tied = getattr(self, "tie_embeddings", True)
        return 0 if tied and embeds else parameter_counts.vocabulary(self, layout)

    def head_activations(self, hidden: float) -> float:
        """Bytes that a head keeps before its output layer, where a hidden state takes ``hidden``."""
        return 0.0

    def outputs(self, padded_vocab_size: int) -> int:
        """The width of the output layer."""
        return padded_vocab_size

    @property
    def unused_parameters(self) -> int:
        """The weights that a token does not use: those of experts that it is not sent to."""
        return 0

    @property
    def peft_task(self) -> str:
        """peft's ``task_type`` of an adapter of the model."""
        return "FEATURE_EXTRACTION"

    def depths(self) -> dict[str, Any]:
        """How many layers there are, by the arguments' names."""
        return {"num_layers": self.num_layers}

    def take_sizes(self, data: Any) -> None:
        """Fill in what is left to the data module; ids and lengths that are given are held against each batch.

        Args:
            data: The data module, or None.

        Raises:
            ValueError: Nobody says a size.
        """
        if self.vocab_size is not None and self.seq_length is not None:
            return
        for name in ("vocab_size", "seq_length"):
            if getattr(self, name) is None:
                value = getattr(data, name, None)
                if value is None:
                    raise ValueError(
                        f"{type(self).__name__}({name}=None) takes the size from the data module, and"
                        f" {'there is no data module' if data is None else type(data).__name__ + ' has none'}."
                        f" Give {type(self).__name__}({name}=...)."
                    )
                setattr(self, name, int(value))
        self.__post_init__()

    def check(self, layout: ParallelLayout) -> None:
        """Refuse sizes that the run's layout cannot divide, before a process group exists.

        Raises:
            LayoutError: One line per broken rule, with the nearest values that work.
        """
        check_model(self.complete_layout(layout), **self.sizes())

    def complete_layout(
        self, layout: ParallelLayout, recompute: Recompute | None = None, trains_every_stage: bool = False
    ) -> ParallelLayout:
        """The layout with the layers of each stage, where the configuration or "auto" says them.

        Args:
            layout: The parallel sizes.
            recompute: As ``MegatronStrategy(recompute=)`` has it, which makes layers slower.
            trains_every_stage: Whether "auto" leaves no stage without layers, as where only layers are trained.

        Raises:
            LayoutError: Fields of megatron-core's in ``extra`` do not fit; or there are too few layers to balance.
        """
        return with_stages(self, layout, recompute, trains_every_stage)

    def sizes(self) -> dict[str, Any]:
        """What a layout has to divide, as ``check_model`` names it."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size or 4 * self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_attention_heads,
            "vocab_size": self.vocab_size,
        }

    def transformer_config(self, settings: BuildSettings, **stack: Any) -> TransformerConfig:
        """megatron-core's configuration of this model in that run.

        Args:
            settings: Settings of the run.
            **stack: Fields of one of several stacks; they replace all others.
        """
        return core_config.transformer_config(self, settings, stack)

    def recomputed_modules(self, settings: BuildSettings) -> list[str]:
        """The modules of each layer whose activations are computed again: those of a list, or what "selective" means.

        "selective" takes what is cheap and large: norms, and the activation where it saves more than its output. It
        takes the core attention where that keeps its scores.

        Raises:
            ValueError: A module that only ``layers="torch"`` recomputes.
        """
        return core_config.recomputed_modules(self, settings)

    def keeps_scores(self, settings: BuildSettings) -> bool:
        """Whether the core attention keeps the scores ``[b, heads, s, s]`` for the backward pass.

        torch's plain kernel ("math") does, which is all that a CPU has for dropout of attention weights.
        """
        dropout_on_cpu = settings.device.type == "cpu" and self.attention_dropout > 0
        return settings.kernels.attention == "math" or dropout_on_cpu

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer's first projection is doubled, one half the gate of the other."""
        return self.activation in GATED

    def family_arguments(self) -> dict[str, Any]:
        """Further arguments of megatron-core's ``TransformerConfig`` that the family sets."""
        return {}

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Refuse names that are no fields.

        Raises:
            ValueError: A name is not a field; the message has the field that was meant.
        """
        known = [each.name for each in fields(cls)]
        if wrong := [name for name in names if name not in known]:
            raise ValueError(unknown_name(wrong, known, cls.__name__))

    def _one_of(self, name: str, value: str, known: Any) -> None:
        if value in list(known):
            return
        hint = did_you_mean(str(value), known, similarity=0)
        choices = f" Choose from: {', '.join(sorted(known))}." if len(known) < 20 else ""
        raise ValueError(f"{type(self).__name__}: unknown {name} {value!r}.{hint}{choices}")


def _in_extra(name: str, owner: str) -> str:
    """Say that megatron-core's own fields stand in ``extra``."""
    is_field = owner.endswith("Config") and name in core_fields()
    return f"it is a field of megatron-core's, extra={{{name!r}: ...}}" if is_field else ""


further_tables.insert(0, _in_extra)  # before the settings of Megatron-LM, which has them too
