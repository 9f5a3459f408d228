"""Megatron-LM's settings of the global batch, which may grow in the first part of the training."""

from __future__ import annotations

import re

from lightning_megatron.cli.migrate.plan import Given, MigrationError, Plan
from lightning_megatron.cli.migrate.settings_table import DATA
from lightning_megatron.data.indexed.batch_size_rampup import BatchSizes, BatchSizeSteps, RampUp

_THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def growth(given: Given) -> BatchSizes | None:
    """The rule by which the global batch grows, or None.

    Raises:
        MigrationError: The words are no such rule.
    """
    words = given.get("step_batch_size_schedule")
    if words is not None:
        return BatchSizeSteps(_sizes(words, given.get("seq_length") or given.get("encoder_seq_length") or 1))
    words = given.get("rampup_batch_size")
    if words is None:
        return None
    try:
        start, increment, samples = (int(word) for word in words)
    except ValueError:
        raise MigrationError(f"rampup_batch_size={' '.join(words)!r}: use START INCREMENT SAMPLES.") from None
    return RampUp(start, increment, samples)


def _sizes(words: list[str], tokens: int) -> dict[int, int]:
    """Global batches by the samples from which on they hold, of ``TOKENS:SIZE`` with K, M, B or T for thousands."""
    found = {}
    for entry in " ".join(words).replace(",", " ").strip("\"' ").split():
        number = re.fullmatch(r"([\d.]+)([KMBT]?):([\d.]+)([KMBT]?)", entry.upper())
        if number is None:
            raise MigrationError(
                f"step_batch_size_schedule={' '.join(words)!r}: use TOKENS:SIZE, such as 0:16 2.4B:320."
            )
        start, size = (int(float(number[n]) * _THOUSANDS[number[n + 1]]) for n in (1, 3))
        found[start // tokens] = size
    return dict(sorted(found.items()))


def full_batch(given: Given) -> int | None:
    """Samples of a global batch, once it grows no more.

    Raises:
        MigrationError: Two settings say different ones.
    """
    rule, size = growth(given), given.get("global_batch_size")
    if not isinstance(rule, BatchSizeSteps):
        return size
    full = list(rule.sizes.values())[-1]
    if size not in (None, full):
        raise MigrationError(f"global_batch_size={size} and step_batch_size_schedule, which ends at {full}: give one.")
    return full


def batches(given: Given, plan: Plan) -> None:
    """Carry over the global batch size and the rule by which it grows."""
    rule, size, has_data = growth(given), full_batch(given), given.get("data_path") is not None
    if size is None:
        if rule is not None:
            says = "it leads to a global batch, which nobody says: global_batch_size"
            plan.say("rampup_batch_size", " ".join(given["rampup_batch_size"]), "yours to do", says)
        if has_data:
            says = "MegatronDataModule(global_batch_size=) must be given: --micro-batch-size, --global-batch-size"
            plan.say("global_batch_size", None, "yours to do", says)
        return
    if has_data:
        plan.put(f"{DATA}.global_batch_size", size)
        plan.say("global_batch_size", size, "carried over", "MegatronDataModule(global_batch_size=)")
    else:
        plan.say("global_batch_size", size, "yours to do", "batch_size of the loader is this / data-parallel size")
    if rule is None:
        return
    name = "step_batch_size_schedule" if isinstance(rule, BatchSizeSteps) else "rampup_batch_size"
    made, arguments = type(rule).__name__, dict(vars(rule))
    if has_data:
        place = {"class_path": f"lightning_megatron.data.{made}", "init_args": arguments}
        plan.put(f"{DATA}.ramp_up", place)
        plan.say(name, " ".join(given[name]), "carried over", f"MegatronDataModule(ramp_up={made}(...))")
    else:
        says = f"batch_sampler=RampUpBatches(sampler, batch_size, {rule}) of the loader"
        plan.say(name, " ".join(given[name]), "yours to do", says)
