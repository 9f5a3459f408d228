"""Says why an architecture of transformers' has no family here, where that is in what kind of model it is."""

from __future__ import annotations

from typing import Any

# Layers with a state in place of attention, or beside it; transformers has no list of them.
_RECURRENT = {
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba",
    "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "plamo2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
}  # fmt: skip
# Encoders that people look for, whose layers are not BERT's.
_ENCODERS = {
    "albert": "All of its layers have the same weights",
    "deberta": "Its attention weighs distances between tokens by weights of its own",
    "deberta-v2": "Its attention weighs distances between tokens by weights of its own",
    "distilbert": "Its attention has no dropout behind it, and its heads have layers and dropouts of their own",
    "electra": "Its embeddings may be narrower than its layers, and it learns to tell which tokens were replaced",
    "mpnet": "Its attention weighs distances between tokens by weights of its own",
}


def why_refused(model_type: str) -> str:
    """A sentence about models of that kind, beginning with a space; empty for text models whose layers all attend."""
    from transformers.models.auto import modeling_auto as known

    if model_type in _RECURRENT:
        return (
            " It has layers with a state, of the kind of Mamba or of linear attention, which megatron-core builds of"
            " Transformer Engine's parts and kernels for CUDA alone; here all layers have attention."
        )
    if model_type in _ENCODERS:
        return (
            f" {_ENCODERS[model_type]}, unlike any BertModule's. Encoders for the same tasks are 'bert', 'roberta',"
            " 'xlm-roberta' and 'modernbert'."
        )
    if any(model_type in getattr(known, name, ()) for name in _PICTURES):
        return (
            " It reads pictures, and models here read text alone. If its language model is a model of its own in"
            " transformers, of one of the families above, save that by itself and load the directory."
        )
    if any(model_type in getattr(known, name, ()) for name in _SOUNDS):
        return " It hears sounds, and models here read text alone."
    return ""


def refuse_remote_code(name: str, fields: dict[str, Any]) -> None:
    """Refuse a model whose classes are files in its own directory, before transformers asks whether to run them.

    Args:
        name: Name of the model.
        fields: Its ``config.json``.

    Raises:
        ValueError: transformers has no configuration of that ``model_type`` itself.
    """
    from transformers import CONFIG_MAPPING

    model_type = fields.get("model_type")
    if "auto_map" in fields and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name}: model_type {model_type!r} is not transformers' own; its code is in the model's directory, and is"
            " not run here. If a version of transformers has the architecture (of many it does), load a version of the"
            " model that was converted to it. Else write a subclass of lightning_megatron.hf.Family; docs/hf.md shows"
            " one."
        )


_PICTURES = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
)  # fmt: skip
_SOUNDS = (
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
)  # fmt: skip
