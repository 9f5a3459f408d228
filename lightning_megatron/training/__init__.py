"""One optimizer step on megatron-core.

Micro-batches, pipeline schedules, gradients, the sharded optimizer, parameter groups and the learning rate's schedule.
Nothing here writes into a Trainer's objects.

Imports ``distributed``.
"""
