"""One file for each architecture of transformers'."""

from lightning_megatron.hf.families import (
    bert,
    gemma,
    glm4,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo2,
    phi,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    starcoder2,
    t5,
)

__all__ = [
    "bert",
    "gemma",
    "glm4",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
    "t5",
]
