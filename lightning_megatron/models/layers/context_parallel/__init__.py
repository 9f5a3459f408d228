"""Attention to rows of which each rank of a context-parallel group holds a part, in three ways."""
