"""Settings of Megatron-LM that mean something only together, each subject in a file of its own."""

from __future__ import annotations

from lightning_megatron.cli.migrate import (
    batch_settings,
    context_parallel_settings,
    data_settings,
    expert_settings,
    latent_settings,
    model_settings,
    optimizer_settings,
    pipeline_settings,
    recompute_settings,
    trainer_settings,
)
from lightning_megatron.cli.migrate.plan import Given, Plan

# In this order: what stands further down reads what those above it have put into the plan.
_SUBJECTS = (
    trainer_settings.precision,
    trainer_settings.timeouts,
    context_parallel_settings.attention_over_ranks,
    recompute_settings.recomputation,
    model_settings.layers_of_stacks,
    pipeline_settings.virtual_stages,
    pipeline_settings.layers_of_stages,
    model_settings.positions,
    model_settings.activation,
    model_settings.query_groups,
    model_settings.attention_window,
    latent_settings.latent_attention,
    expert_settings.experts,
    batch_settings.batches,
    data_settings.data,
    data_settings.documents,
    trainer_settings.run_length,
    optimizer_settings.optimizer,
    optimizer_settings.schedule,
    trainer_settings.evaluation,
    trainer_settings.checkpoints,
    trainer_settings.loggers,
)


def carry_over_combined(given: Given, plan: Plan) -> None:
    """Carry over the settings that mean something only together.

    Args:
        given: All settings, by Megatron's names, with their values read.
        plan: The run in the making; settings that stand alone are in it already.
    """
    for carry_over_subject in _SUBJECTS:
        carry_over_subject(given, plan)
