"""One optimizer step on megatron-core.

Micro-batches, pipeline schedules, gradients, the sharded optimizer, parameter groups and learning-rate schedules.
Nothing here writes into a Trainer's objects.

Imports ``distributed``.
"""
