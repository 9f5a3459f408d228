"""Megatron-LM's settings of pipeline stages: layers per virtual stage, and stages with different numbers of layers."""

from __future__ import annotations

from lightning_megatron.cli.migrate.model_settings import depth
from lightning_megatron.cli.migrate.plan import Given, MigrationError, Plan
from lightning_megatron.cli.migrate.settings_table import CONFIG, MODELS, STRATEGY
from lightning_megatron.distributed.pipeline_cut import number_of_stages, of_core_fields, read

# Megatron-LM's names, and megatron-core's.
_CORE_NAMES = {
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split": "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split": "account_for_loss_in_pipeline_split",
}


def virtual_stages(given: Given, plan: Plan) -> None:
    """Carry over layers per virtual stage, as virtual stages per pipeline stage."""
    name = "num_layers_per_virtual_pipeline_stage"
    each = given.get(name)
    if each is None:
        return
    layers, pp = depth(given), given.get("pipeline_model_parallel_size", 1)
    if layers is None:
        plan.say(name, each, "yours to do", f"MegatronStrategy(vp=): the model's layers / {pp} stages / {each}")
        return
    layers += sum(bool(given.get(counted)) for counted in _CORE_NAMES if counted.startswith("account_for"))
    if layers % (pp * each):
        raise MigrationError(
            f"{name}={each}: {layers} layers on {pp} stages are no multiple of it. Use a number that divides"
            f" {layers // pp if layers % pp == 0 else layers}."
        )
    chunks = layers // pp // each
    plan.put(f"{STRATEGY}.vp", chunks if chunks > 1 else None)
    plan.say(name, each, "carried over", f"MegatronStrategy(vp={chunks}), chunks in place of layers; one is none")


def layers_of_stages(given: Given, plan: Plan) -> None:
    """Carry over how many layers each stage has: as a list, or where nobody knows the layers as megatron-core's fields.

    Raises:
        MigrationError: The numbers do not fit the layers and stages.
    """
    whole = "pipeline_model_parallel_layout"
    names = {name: core for name, core in _CORE_NAMES.items() if given.get(name)}
    pp, place = given.get("pipeline_model_parallel_size", 1), f"{STRATEGY}.layers_per_stage"
    is_t5 = str(plan.get("model.class_path")).endswith(MODELS["t5"][0])
    for name in (*_CORE_NAMES, whole):
        if given.get(name) is not None and (pp == 1 or not given[name]):
            plan.say(name, given[name], "not needed", "one stage has all layers" if pp == 1 else "it asks for nothing")
        elif given.get(name) and is_t5:
            says = "MegatronStrategy(layers_per_stage=[...]): layers of the encoder's stages, then of the decoder's"
            plan.say(name, given[name], "yours to do", says)
    if pp == 1 or is_t5:
        return
    try:
        _layout(given, plan, pp)
        if names and (layers := depth(given)) is not None:
            fields = {core: given[name] for name, core in names.items()}
            plan.put(place, list(of_core_fields(fields, layers, pp, plan.get(f"{STRATEGY}.vp")) or ()))
    except ValueError as error:
        raise MigrationError(str(error)) from None
    for name, core in names.items():
        if depth(given) is None:
            plan.put(f"{CONFIG}.extra.{core}", given[name])
            plan.say(name, given[name], "carried over", f"config.extra[{core!r}]", f"{CONFIG}.extra.{core}")
        else:
            plan.say(name, given[name], "carried over", f"MegatronStrategy(layers_per_stage={plan.get(place)})", place)


def _layout(given: Given, plan: Plan, pp: int) -> None:
    """Carry over megatron-core's text, which also says how many virtual stages there are."""
    name, place = "pipeline_model_parallel_layout", f"{STRATEGY}.layers_per_stage"
    if (text := given.get(name)) is None:
        return
    chunks, rest = divmod(number_of_stages(text), pp)
    if rest:
        raise MigrationError(f"{name}={text!r}: its stages are no multiple of the {pp} of the pipeline.")
    plan.put(f"{STRATEGY}.vp", chunks if chunks > 1 else None)
    read(text, pp, plan.get(f"{STRATEGY}.vp"))
    plan.put(place, text)
    plan.say(name, text, "carried over", "MegatronStrategy(layers_per_stage=)", place)
