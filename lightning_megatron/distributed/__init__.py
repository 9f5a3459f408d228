"""Who the ranks are and how they talk.

The parallel layout, process groups and seeds, megatron-core on a machine without CUDA, weights that several ranks hold,
and which rank has failed or does not answer. ``arguments.py`` words the refusal of a wrong argument for every room, and
``lightning_private.py`` has the private names of Lightning that the rooms lean on.

Imports nothing else of the package.
"""
