"""ModernBERT: rotary positions, windows that reach both ways in most layers, gated layers, and few biases."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from lightning_megatron.hf.config_reader import Fields
from lightning_megatron.hf.families import layer_types, rope, sizes
from lightning_megatron.hf.families.bert import Bert
from lightning_megatron.hf.weight_mapping import FusedQueryKeyValue, WeightMapping, table

_ACTIVATIONS = {"gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "silu": "swiglu"}
# Fields of published files that transformers' model does not read, or has put into others.
_OF_OLD_FILES = (
    "global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "layer_norm_eps", "position_embedding_type",
    "reference_compile", "repad_logits_with_grad",
)  # fmt: skip
# Each is elsewhere than the dropouts here, and the published models have none.
_DROPOUTS = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")


class ModernBert(Bert):
    """Its classifiers begin with the dense layer, activation and norm that masked language modelling has."""

    model_type = "modernbert"
    prefix = "model."
    head = ("head.", "decoder.", "classifier.")
    heads = {task: ending for task, ending in Bert.heads.items() if task != "pretraining"}
    expresses = (
        "position_embedding", "rotary_base", "window_rotary_base", "rope_scaling", "sliding_window",
        "sliding_window_layers", "bias", "norm_bias", "classifier_head", "classifier_pooling",
    )  # fmt: skip

    @override
    def read_config(self, fields: Fields) -> dict[str, Any]:
        task, bias = self.task(fields), fields("attention_bias")
        for name in ("mlp_bias", "classifier_bias"):
            fields.must_be(name, bias)
        for name in _DROPOUTS:
            fields.must_be(name, 0.0)
        if task == "question_answering":
            fields.must_be("num_labels", 2)
        if task == "masked_lm":
            fields.must_be("decoder_bias", True)
            fields.must_be("tie_word_embeddings", True)
            fields("sparse_prediction")  # leaves out logits of tokens without a label, which have no loss
            fields.must_be("sparse_pred_ignore_index", -100)
        fields.must_be("classifier_activation", fields("hidden_activation"))
        fields("local_attention")  # twice the window
        for name in _OF_OLD_FILES:
            if hasattr(fields.config, name):
                fields(name)
        rotary = rope.read_two(fields)
        del rotary["rotary_percent"]
        return {
            **sizes.read_shape(fields),
            "num_token_types": 0,
            "activation": fields.one_of("hidden_activation", _ACTIVATIONS),
            "layernorm_epsilon": fields("norm_eps"),
            "norm_placement": "embedding_pre",
            "bias": bias,
            "norm_bias": fields("norm_bias"),
            "task": task,
            "num_labels": fields("num_labels"),
            "problem_type": fields("problem_type") if task == "sequence_classification" else None,
            "classifier_head": "transform",
            "classifier_pooling": fields("classifier_pooling"),
            **layer_types.read(fields),
            **rotary,
        }

    @override
    def write_config(self, config: Any) -> dict[str, Any]:
        activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
        self._require(config, norm_placement=("embedding_pre",), position_embedding=("rope",), num_token_types=(0,))
        self._require(config, activation=tuple(activations), classifier_head=("transform",), task=tuple(self.heads))
        self._require(config, hidden_dropout=(0.0,), attention_dropout=(0.0,), extra=({},))
        self._require(config, kv_channels=(None, config.hidden_size // config.num_attention_heads))
        if config.window_rotary_base is None and config.sliding_window is not None:
            self._require(config, rope_scaling=(None,))  # of layers with a window they are not stretched
        kinds = layer_types.written(config, switch=False)
        reach = kinds.pop("sliding_window", None)
        return {
            **sizes.written_shape(config),
            "hidden_activation": activations[config.activation],
            "classifier_activation": activations[config.activation],
            "norm_eps": config.layernorm_epsilon,
            "attention_bias": config.bias,
            "mlp_bias": config.bias,
            "classifier_bias": config.bias,
            "norm_bias": config.norm_bias,
            "num_labels": config.num_labels,
            "problem_type": config.problem_type,
            "classifier_pooling": config.classifier_pooling,
            "rope_parameters": rope.written_two(config),
            **kinds,
            **({} if reach is None else {"local_attention": 2 * reach}),
        }

    @override
    def weight_mapping(self, config: Any) -> WeightMapping:
        ours, theirs = "encoder.layers.{}.", "model.layers.{}."
        entries: dict[str, Any] = {"embedding.word_embeddings.weight": "model.embeddings.tok_embeddings.weight"}
        for kind in ("weight", "bias") if config.bias else ("weight",):
            entries |= {
                f"{ours}self_attention.linear_qkv.{kind}": FusedQueryKeyValue(f"{theirs}attn.Wqkv.{kind}"),
                f"{ours}self_attention.linear_proj.{kind}": f"{theirs}attn.Wo.{kind}",
                f"{ours}mlp.linear_fc1.{kind}": f"{theirs}mlp.Wi.{kind}",
                f"{ours}mlp.linear_fc2.{kind}": f"{theirs}mlp.Wo.{kind}",
                f"{self._transform(config)}.dense.{kind}": f"head.dense.{kind}",
            }
        for kind in ("weight", "bias") if config.norm_bias else ("weight",):
            entries |= {
                f"embedding.layer_norm.{kind}": f"model.embeddings.norm.{kind}",
                f"{ours}input_layernorm.{kind}": f"{theirs}attn_norm.{kind}",
                f"{ours}pre_mlp_layernorm.{kind}": f"{theirs}mlp_norm.{kind}",
                f"encoder.final_layernorm.{kind}": f"model.final_norm.{kind}",
                f"{self._transform(config)}.layer_norm.{kind}": f"head.norm.{kind}",
            }
        entries |= self.last_layer(config)
        found = table(entries, config.num_layers)
        return {name: mapped for name, mapped in found.items() if not name.startswith(f"{ours.format(0)}input_layer")}

    def last_layer(self, config: Any) -> dict[str, Any]:
        """The weights of a head behind its transform."""
        if config.task == "masked_lm":
            return {"output_layer.bias": "decoder.bias"}
        ours = "qa_outputs" if config.task == "question_answering" else "classification_head"
        return {f"{ours}.{kind}": f"classifier.{kind}" for kind in ("weight", "bias")}

    def _transform(self, config: Any) -> str:
        return "lm_head" if config.task == "masked_lm" else "transform"

    @override
    def tied(self, config: Any) -> dict[str, str]:
        return {"decoder.weight": "model.embeddings.tok_embeddings.weight"} if config.task == "masked_lm" else {}
