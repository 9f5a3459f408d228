"""One file for each architecture of transformers'."""

from lightning_megatron.hf.families import bert, gemma, gpt2, gpt_neox, llama, mistral, phi3, qwen2, qwen3, t5

__all__ = ["bert", "gemma", "gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3", "t5"]
