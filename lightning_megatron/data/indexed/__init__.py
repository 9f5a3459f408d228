"""Megatron's indexed files (``.bin`` and ``.idx``), and the samples that are cut from them."""
