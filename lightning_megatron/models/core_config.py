"""Translates a model's configuration and a run's settings to megatron-core's ``TransformerConfig``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_megatron.distributed import pipeline_cut
from lightning_megatron.models import recompute

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from lightning_megatron.models.build_settings import BuildSettings

# Kernels that compile or need CUDA extensions; plain PyTorch runs everywhere and `extra` turns them on.
_PLAIN_KERNELS = dict.fromkeys(
    ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "persist_layer_norm",
     "gradient_accumulation_fusion", "apply_rope_fusion"),
    False,
)  # fmt: skip
# How Transformer Engine's attention reaches across ranks, by our names (``MegatronStrategy(cp_comm=)``).
_TRANSFORMER_ENGINES_WAYS = {None: "p2p", "ring": "p2p", "all_gather": "all_gather", "all_to_all": "a2a"}
# What megatron-core cannot recompute without Transformer Engine, and its names in models/layers/recomputation.py.
_RECOMPUTED_HERE = {
    "layernorm": "norm_output", "mlp_act": "mlp_act", "mlp": "whole_mlp", "mla_up_proj": "latent_up",
}  # fmt: skip


def transformer_config(config: Any, settings: BuildSettings, stack: dict[str, Any]) -> TransformerConfig:
    """megatron-core's configuration of a model in a run; see ``ModelConfig.transformer_config``."""
    from megatron.core.transformer import TransformerConfig

    from lightning_megatron.models.activations import FUNCTIONS

    cut = config.complete_layout(settings.layout).layers_per_stage
    arguments: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "ffn_hidden_size": config.ffn_hidden_size,
        "kv_channels": config.kv_channels,
        "layernorm_epsilon": config.layernorm_epsilon,
        "activation_func": FUNCTIONS[config.activation],
        "gated_linear_unit": config.is_gated,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "init_method_std": config.init_method_std,
        **config.family_arguments(),
        **_PLAIN_KERNELS,
        **settings.transformer_config_arguments(),
        "cp_comm_type": settings.cp_comm if config.layers == "torch" else _TRANSFORMER_ENGINES_WAYS[settings.cp_comm],
    }
    modules = config.recomputed_modules(settings)
    arguments.update(recompute.transformer_config_arguments(settings.recompute, modules))
    arguments.update({name: value for name, value in config.extra.items() if name not in pipeline_cut.CORE_FIELDS})
    if isinstance(cut, tuple):
        arguments["pipeline_model_parallel_layout"] = pipeline_cut.core_layout(
            cut, arguments.get("mtp_num_layers") or 0
        )
    arguments.update(stack)
    _check_residual(config, arguments)
    modules = arguments.pop("recompute_modules", None)
    ours = [name for name in modules or () if name in _RECOMPUTED_HERE and config.layers == "torch"]
    theirs = None if modules is None else [name for name in modules if name not in ours]
    made = TransformerConfig(**arguments, recompute_modules=theirs)
    made.recompute_modules = [*(made.recompute_modules or ()), *(_RECOMPUTED_HERE[name] for name in ours)]
    return made


def recomputed_modules(config: Any, settings: BuildSettings) -> list[str]:
    """The modules of each layer whose activations are computed again; see ``ModelConfig.recomputed_modules``."""
    if isinstance(settings.recompute, list | tuple):
        if config.layers != "torch" and "mlp_act" in settings.recompute:
            raise ValueError(
                f"MegatronStrategy(recompute={settings.recompute}): only {type(config).__name__}(layers='torch')"
                " recomputes 'mlp_act'. Use 'mlp', or leave it out."
            )
        if "mla_up_proj" in settings.recompute and getattr(config, "latent_attention", None) is None:
            raise ValueError(
                f"MegatronStrategy(recompute={settings.recompute}): 'mla_up_proj' is of multi-latent attention,"
                f" which this {type(config).__name__} does not have. Leave it out."
            )
        return list(settings.recompute)
    if settings.recompute != "selective":
        return []
    if config.layers != "torch":
        return ["core_attn"]
    activation = [] if config.activation == "relu" else ["mlp_act"]  # which saves its output alone
    return ["layernorm", *activation, *(["core_attn"] if config.keeps_scores(settings) else [])]


def _check_residual(config: Any, arguments: dict[str, Any]) -> None:
    """Refuse hidden states that are fp32 between layers of another type, which stages and norms do not take."""
    dtype = str(arguments["params_dtype"]).removeprefix("torch.")
    if arguments.get("fp32_residual_connection") and config.layers == "torch" and dtype != "float32":
        raise ValueError(
            f"{type(config).__name__}(extra={{'fp32_residual_connection': True}}): the torch layers add in the type"
            f" of their weights, here {dtype}. Leave it out, or use"
            " Trainer(precision='32-true')."
        )
