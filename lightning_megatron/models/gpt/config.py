"""``GPTConfig``: the shape of a GPT, in the field's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_megatron.checkpoint.plain_classes import formerly_in, plain_class
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.distributed.layout import LayoutError, ParallelLayout
from lightning_megatron.models import attention_windows, expert_sizes, parameter_counts
from lightning_megatron.models.gpt import config_checks as checks
from lightning_megatron.models.gpt.experts.config import Experts, refuse_own_fields
from lightning_megatron.models.gpt.latent import config as latent
from lightning_megatron.models.gpt.latent.config import LatentAttention
from lightning_megatron.models.heads import settings as heads
from lightning_megatron.models.heads.settings import ProblemType
from lightning_megatron.models.model_config import ROPE_TYPES, LayerStack, ModelConfig
from lightning_megatron.models.parameter_counts import Part

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from lightning_megatron.models.build_settings import BuildSettings

GPTTaskName = Literal["causal_lm", "sequence_classification", "token_classification", "question_answering"]

_POSITIONS = {"learned": "learned_absolute", "rope": "rope", "none": "none"}


@answer_wrong_names
@plain_class
@formerly_in("lightning_megatron.modules.gpt_config")
@dataclass(kw_only=True)
class GPTConfig(ModelConfig):
    """The shape of a GPT.

    Args:
        num_layers: Transformer layers.
        hidden_size: Width of the hidden states.
        num_attention_heads: Query heads.
        vocab_size: Token ids that occur; the embedding is padded to a multiple of
            ``make_vocab_size_divisible_by · tp``. None: the data module's.
        seq_length: Longest sequence, in tokens. None: the data module's.
        ffn_hidden_size: Width of the feed-forward layer. None: four times ``hidden_size``.
        num_query_groups: Key and value heads (grouped-query attention). None: one per query head.
        kv_channels: Size of a head. None: ``hidden_size / num_attention_heads``.
        position_embedding: Learned absolute positions, rotary ones, or none.
        rotary_base: Base period of the rotary frequencies.
        rotary_percent: Share of a head's channels that is rotated.
        rotary_layers: Numbers, from 0, of the layers that rotate queries and keys. None: all.
        window_rotary_base: Base period in the layers that have a window, whose frequencies are not stretched, as in
            Gemma 3. None: those layers are as all others.
        rope_scaling: How the rotary frequencies are stretched for long sequences, as in transformers' configurations:
            ``{"rope_type": "llama3", "factor": 8.0, ...}``; kinds "linear", "llama3" and "yarn".
        sliding_window: Tokens that a token looks at, itself and those before it. None: all before it.
        sliding_window_layers: Numbers, from 0, of the layers that have the window. None: all.
        parallel_residual: Whether the feed-forward layer is beside attention, as in GPT-NeoX, not behind it.
        shared_norm: Whether both then read the output of one norm, as in Phi.
        norm_placement: "pre": a norm before attention and one before the feed-forward layer. "output": a norm on the
            output of each, as in OLMo 2. "sandwich": both, as in GLM-4 and Gemma 2.
        joint_qk_norm: Whether the norms of queries and keys (``extra={"qk_layernorm": True}``) are over all heads
            together, as in OLMo 2, not over each.
        embedding_multiplier: Factor on the embeddings' output, as in Gemma.
        residual_multiplier: Factor on the output of attention and feed-forward layers, as in Granite.
        logits_divisor: Divides the logits, as in Granite.
        attention_score_cap: What no score of attention is beyond, as ``cap · tanh(score / cap)`` in Gemma 2. None: no
            cap.
        logits_cap: What no logit is beyond, likewise.
        attention_sinks: Whether each head has a learned score beside those of the keys, which takes a share of the
            attention and gives nothing, as in GPT-OSS.
        output_bias: Whether the output layer has a bias, as in Phi.
        normalization: LayerNorm or RMSNorm.
        layernorm_epsilon: Added to the variance.
        activation: Activation of the feed-forward layer; "swiglu", "geglu", "geglu_tanh" and "quick_geglu" (by
            ``x · sigmoid(1.702 x)``) are gated.
        bias: Whether linear layers have biases.
        qkv_bias: Whether the query, key and value projection has one. None: as ``bias``.
        tie_embeddings: Whether the output layer's weight is the embedding's.
        latent_attention: Multi-latent attention in place of attention with heads of ``kv_channels``;
            ``LatentAttention``, or a dictionary of its arguments. None: there is none.
        experts: A mixture of experts in place of the feed-forward layer; ``Experts``, or a dictionary of its arguments.
            None: there is none.
        mtp: Layers of multi-token prediction, as in DeepSeek-V3: behind the model, each predicts one token further on
            than the one before it, in training only. They need rotary positions, or none.
        mtp_weight: Weight of the mean of their losses beside the loss of the next tokens, which alone is logged.
        task: "causal_lm": the next token. "sequence_classification", regression included, from the last token of each
            row that is no padding; "token_classification"; or "question_answering": at which tokens of a row the answer
            begins and ends.
        num_labels: Outputs of a classification head; question answering has two, the begin and the end.
        problem_type: Loss of sequence classification, by transformers' names. None: "regression" for one label, else
            "single_label_classification" for integer labels and "multi_label_classification" for floating ones.
        pad_token_id: The token of padding, by which the last token of a row is found, as in transformers. None: the
            last one that ``attention_mask`` keeps.
        classifier_dropout: Dropout before the head of token classification.
        hidden_dropout: Dropout after the embedding, attention and feed-forward.
        attention_dropout: Dropout of attention weights.
        init_method_std: Standard deviation of the initial weights.
        make_vocab_size_divisible_by: Unit of the padded vocabulary, see ``vocab_size``.
        layers: "torch", or "transformer_engine" where it is installed.
        extra: Further fields of megatron-core's ``TransformerConfig``, by its names; they win over what is above.

    Raises:
        LayoutError: Sizes that fit no layout, such as heads that do not divide ``hidden_size``.
        ValueError: An unknown activation, normalization, position embedding, or key of ``extra``; a probability that is
            none.
    """

    kind: ClassVar[str] = "GPT"
    rare: ClassVar[tuple[str, ...]] = (
        "rotary_layers", "window_rotary_base", "shared_norm", "norm_placement", "joint_qk_norm",
        "residual_multiplier", "logits_divisor", "attention_score_cap", "logits_cap", "attention_sinks",
        "output_bias", "latent_attention", "experts", "task",
    )  # fmt: skip

    num_query_groups: int | None = None
    position_embedding: Literal["learned", "rope", "none"] = "learned"
    rotary_base: float = 10000
    rotary_percent: float = 1.0
    rotary_layers: list[int] | None = None
    window_rotary_base: float | None = None
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = None
    sliding_window_layers: list[int] | None = None
    parallel_residual: bool = False
    shared_norm: bool = False
    norm_placement: Literal["pre", "output", "sandwich"] = "pre"
    joint_qk_norm: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    attention_score_cap: float | None = None
    logits_cap: float | None = None
    attention_sinks: bool = False
    output_bias: bool = False
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    bias: bool = True
    qkv_bias: bool | None = None
    tie_embeddings: bool = True
    latent_attention: LatentAttention | None = None
    experts: Experts | None = None
    mtp: int = 0
    mtp_weight: float = 0.1
    task: GPTTaskName = "causal_lm"
    num_labels: int = 2
    problem_type: ProblemType | None = None
    pad_token_id: int | None = None
    classifier_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse choices that do not exist."""
        if isinstance(self.latent_attention, dict):
            self.latent_attention = LatentAttention(**self.latent_attention)
        if isinstance(self.experts, dict):
            self.experts = Experts(**self.experts)
        arguments = Arguments("GPTConfig")
        latents = {"latent_attention": self.latent_attention}
        arguments.kind(LatentAttention, "LatentAttention(kv_lora_rank=...)", optional=True, **latents)
        arguments.kind(Experts, "Experts(num=..., top_k=...)", optional=True, experts=self.experts)
        self._one_of("position_embedding", self.position_embedding, _POSITIONS)
        self._one_of("normalization", self.normalization, ("LayerNorm", "RMSNorm"))
        self._one_of("norm_placement", self.norm_placement, ("pre", "output", "sandwich"))
        arguments.whole(optional=True, num_query_groups=self.num_query_groups, sliding_window=self.sliding_window)
        arguments.number(above=0, rotary_base=self.rotary_base)
        arguments.number(above=0, at_most=1, rotary_percent=self.rotary_percent)
        arguments.number(embedding_multiplier=self.embedding_multiplier, residual_multiplier=self.residual_multiplier)
        arguments.number(above=0, logits_divisor=self.logits_divisor)
        caps = {name: getattr(self, name) for name in ("attention_score_cap", "logits_cap")}
        arguments.number(optional=True, above=0, window_rotary_base=self.window_rotary_base, **caps)
        flags = ("attention_sinks", "parallel_residual", "shared_norm", "joint_qk_norm", "bias", "output_bias")
        arguments.flag(**{name: getattr(self, name) for name in (*flags, "tie_embeddings")})
        arguments.flag(optional=True, qkv_bias=self.qkv_bias)
        super().__post_init__()
        arguments.kind(dict, "a dictionary with rope_type, factor, ...", optional=True, rope_scaling=self.rope_scaling)
        if self.rope_scaling is not None:
            self._one_of("rope_type", str(self.rope_scaling.get("rope_type")), ROPE_TYPES)
        attention_windows.check_layers(self, "sliding_window_layers", "sliding_window", "its length")
        attention_windows.check_layers(self, "rotary_layers")
        if self.window_rotary_base is not None and not (self.sliding_window and self.position_embedding == "rope"):
            raise ValueError(
                f"GPTConfig(window_rotary_base={self.window_rotary_base}) is of layers with a window that rotate"
                " queries and keys. Give sliding_window and position_embedding='rope', or leave it out."
            )
        checks.check_norms(self)
        if self.attention_sinks and (self.attention_dropout or self.attention_score_cap):
            raise ValueError(
                f"GPTConfig(attention_sinks=True) needs attention_dropout=0.0 (here {self.attention_dropout}) and"
                f" attention_score_cap=None (here {self.attention_score_cap})."
            )
        self._check_experts()
        checks.check_mtp(self)
        checks.check_task(self)
        self._check_latent_attention()
        if self.layers != "torch":
            for name in ("rope_scaling", "parallel_residual", "embedding_multiplier", "mtp", *self.rare):
                if name != "task" and getattr(self, name) != getattr(GPTConfig, name):
                    raise ValueError(f"GPTConfig({name}={getattr(self, name)!r}) needs layers='torch'.")

    def stacks(self, lengths: tuple[int, ...]) -> list[LayerStack]:
        """One stack, whose queries look back: at half of the sequence, or at a window that all layers have."""
        (length,) = lengths
        seen = length
        if self.sliding_window is not None and self.sliding_window_layers is None:
            seen = min(length, 2 * self.sliding_window)  # halved below, as the triangle is
        return [LayerStack(self.num_layers, length, [(length, seen / 2)])]

    def layer_work(self, stack: LayerStack, number: int) -> tuple[float | None, int]:
        """The keys that a query sees through the layer's window, if it has one; the weights of the experts it uses."""
        seen, weights = super().layer_work(stack, number)
        if self.sliding_window is not None and attention_windows.has_window(self, number):
            seen = min(stack.tokens / 2, self.sliding_window)
        if self.experts is not None and self.experts.in_layers(self.num_layers)[number]:
            width = self.experts.top_k * (self.experts.ffn_hidden_size or self.ffn_hidden_size or 4 * self.hidden_size)
            width += self.experts.shared_ffn_hidden_size or 0
            weights = self.hidden_size * ((3 if self.is_gated else 2) * width + self.experts.num)
        return seen, weights

    def embedding_parameters(self, layout: ParallelLayout) -> int:
        """The embedding of tokens and, where they are learned, of positions."""
        positions = self.seq_length * self.hidden_size if self.position_embedding == "learned" else 0
        return super().embedding_parameters(layout) + positions

    def head_parameters(self, layout: ParallelLayout, embeds: bool) -> int:
        """The output layer's weights, its bias among them, and those of multi-token prediction; or a head's."""
        if self.task != "causal_lm":
            return self.num_labels * (self.hidden_size + self.head_has_bias)
        vocabulary = parameter_counts.vocabulary(self, layout)
        weights = super().head_parameters(layout, embeds)
        if self.output_bias:
            weights += vocabulary // self.hidden_size
        if self.mtp and not embeds and not self.tie_embeddings:
            weights += vocabulary  # a copy of the embedding
        joins = 2 * self.hidden_size**2 // layout.tp + 3 * parameter_counts.norm(self)
        layer = parameter_counts.layer(self, layout, 1)  # as the last one
        if expert_sizes.ends_with_experts(self):
            layer += expert_sizes.layer_weights(self, layout) - parameter_counts.feed_forward(self, layout)
        return weights + self.mtp * (joins + layer)

    def check(self, layout: ParallelLayout) -> None:
        """Refuse sizes that the run's layout cannot divide, and experts whose biases it would divide.

        Raises:
            LayoutError: One line per broken rule, with the nearest values that work.
        """
        super().check(layout)
        layout = self.complete_layout(layout)
        if layout.mtp not in (None, self.mtp):
            raise layout.error(
                f"megatron-core's text of the stages has {layout.mtp} letters m, layers of multi-token prediction, and"
                f" the model has GPTConfig(mtp={self.mtp}). Write as many, or none."
            )
        if self.experts is not None and self.bias and layout.expert_tp > 1:
            why = "" if layout.etp else f" (as tp={layout.tp}, where etp is not given)"
            raise LayoutError(
                f"etp={layout.expert_tp} divides each expert{why}, and megatron-core divides none that has biases"
                " (GPTConfig(bias=True)). Use MegatronStrategy(etp=1), and ep to divide experts."
            )

    @property
    def unused_parameters(self) -> int:
        """The weights that a token does not use: those of experts that it is not sent to."""
        number = expert_sizes.layers_with_experts(self, Part(0, self.num_layers))
        number += self.mtp if expert_sizes.ends_with_experts(self) else 0
        return number * expert_sizes.unused_weights(self) if number else 0

    @property
    def outputs_are_sharded(self) -> bool:  # type: ignore[override]
        """Whether there are logits of the vocabulary."""
        return self.task == "causal_lm"

    @property
    def share_of_counted_tokens(self) -> float:  # type: ignore[override]
        """Of a sequence's class, one token counts."""
        return 1 / self.seq_length if self.task == "sequence_classification" else 1.0

    def outputs(self, padded_vocab_size: int) -> int:
        """The width of the output layer: the vocabulary, or the labels."""
        return padded_vocab_size if self.task == "causal_lm" else self.num_labels

    @property
    def head_has_bias(self) -> bool:
        """Whether the layer of a head with labels has a bias, as in transformers."""
        return self.task in ("token_classification", "question_answering")

    @property
    def peft_task(self) -> str:
        """peft's ``task_type`` of an adapter of the model."""
        return heads.PEFT_TASKS.get(self.task, "CAUSAL_LM")

    def sizes(self) -> dict[str, Any]:
        """What a layout has to divide."""
        groups = self.num_query_groups or self.num_attention_heads
        sizes = {**super().sizes(), "num_query_groups": groups, "seq_length": self.seq_length}
        if self.latent_attention is not None:
            sizes["latents"] = self.latent_attention.divided()
        if self.experts is not None:
            sizes["experts"] = self.experts.sizes(sizes["ffn_hidden_size"])
        return sizes

    def family_arguments(self) -> dict[str, Any]:
        """Normalization, biases and query groups."""
        return {
            "num_query_groups": self.num_query_groups,
            "normalization": self.normalization,
            "add_bias_linear": self.bias,
            "add_qkv_bias": self.bias if self.qkv_bias is None else self.qkv_bias,
            "softmax_type": "learnable" if self.attention_sinks else "vanilla",
            **({} if self.sliding_window is None else attention_windows.core_fields(self, self.sliding_window - 1, 0)),
            **self._expert_arguments(),
            **self._rotary_arguments(),
            **self._latent_arguments(),
        }

    def transformer_config(self, settings: BuildSettings, **stack: Any) -> TransformerConfig:
        """megatron-core's configuration, which has the settings of experts and the cap of scores beside its own."""
        made = super().transformer_config(settings, **stack)
        made.experts, made.attention_score_cap = self.experts, self.attention_score_cap
        for each in (made.no_rope_freq, made.window_attn_skip_freq):
            if self.mtp and isinstance(each, list):
                each.extend(each[-1:] * self.mtp)  # their layers are as the last one
        if self.latent_attention is not None:
            for name, value in self.latent_attention.settings(self.rope_scaling).items():
                setattr(made, name, value)
        return made

    @property
    def megatron_position_embedding(self) -> str:
        """megatron-core's name of the position embedding."""
        return _POSITIONS[self.position_embedding]

    def _check_experts(self) -> None:
        """Refuse what no layer of experts has."""
        refuse_own_fields("GPTConfig", self.extra, self.experts)
        if self.experts is None:
            return
        self.experts.in_layers(self.num_layers)
        if self.bias and self.experts.shared_ffn_hidden_size is not None:
            raise ValueError(
                "GPTConfig(experts=Experts(shared_ffn_hidden_size=...)) needs bias=False: shared experts of"
                " megatron-core have no biases. qkv_bias=True gives queries, keys and values theirs."
            )
        for name, usual in (("layers", "torch"), ("parallel_residual", False)):
            if getattr(self, name) != usual:
                raise ValueError(
                    f"GPTConfig(experts=...) needs {name}={usual!r}, and here it is {getattr(self, name)!r}."
                )

    def _check_latent_attention(self) -> None:
        """Refuse what multi-latent attention does not have."""
        if self.latent_attention is None:
            return
        latent.refuse_own_fields("GPTConfig", self.extra)
        for name, usual, why in (
            ("position_embedding", "rope", "rotates a part of each head"),
            ("num_query_groups", None, "makes keys and values for each head"),
            ("kv_channels", None, "has sizes of heads of its own"),
            ("rotary_percent", 1.0, "says by qk_rope_head_dim how many channels are rotated"),
            ("joint_qk_norm", False, "normalises latents, not queries and keys"),
            ("attention_score_cap", None, "has no cap on its scores"),
            ("attention_sinks", False, "has no sinks"),
            ("window_rotary_base", None, "rotates by one base in all layers"),
            ("qkv_bias", None, "has no biases before its output"),
        ):
            value = getattr(self, name)
            if value != usual:
                raise ValueError(
                    f"GPTConfig(latent_attention=..., {name}={value!r}): multi-latent attention {why}. Use"
                    f" {name}={usual!r}."
                )

    def _latent_arguments(self) -> dict[str, Any]:
        if self.latent_attention is None:
            return {}
        return {
            "kv_channels": self.latent_attention.qk_rope_head_dim,  # of the rotary angles
            "rotary_interleaved": self.latent_attention.rope_interleave,
        }

    def _expert_arguments(self) -> dict[str, Any]:
        if self.experts is None:
            return {}
        return self.experts.megatron_arguments(self.num_layers, self.ffn_hidden_size or 4 * self.hidden_size)

    def _rotary_arguments(self) -> dict[str, Any]:
        """megatron-core's: 1 for each layer that does not rotate."""
        if self.rotary_layers is None:
            return {}
        return {"no_rope_freq": [int(number not in self.rotary_layers) for number in range(self.num_layers)]}
