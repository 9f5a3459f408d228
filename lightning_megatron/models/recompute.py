"""What ``MegatronStrategy(recompute=)`` may say, and megatron-core's settings of it.

megatron-core recomputes whole layers ("full", or a number of them) and the core attention ("core_attn"). Its
recomputation of norms needs Transformer Engine, that of feed-forward layers does not end where they have biases, and of
a dense layer's activation it has none: ``models/layers/recomputation.py`` has these three.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from lightning_megatron.distributed.suggestions import did_you_mean, is_positive_int

RecomputedModule = Literal["layernorm", "mlp_act", "core_attn", "mlp", "mla_up_proj"]
Recompute = Literal["selective", "full"] | int | list[RecomputedModule]

# Those of experts, which are a layer's feed-forward part here.
OF_EXPERTS = {"moe": "mlp", "moe_act": "mlp_act", "shared_experts": "mlp"}


def check(recompute: object, error: type[Exception] = ValueError, of: str = "MegatronStrategy") -> None:
    """Refuse what is no ``Recompute``, and modules that no layer here has.

    Args:
        recompute: What was given.
        error: The type of the error.
        of: The class whose argument it is.

    Raises:
        Exception: An ``error`` that has the value and what to use.
    """
    if recompute in (None, "selective", "full") or is_positive_int(recompute):
        return
    names = recompute if isinstance(recompute, list | tuple) else ()
    for name in names:
        if name in OF_EXPERTS:
            raise error(
                f"{of}(recompute={recompute!r}): {name!r} is {OF_EXPERTS[name]!r} here, of layers with experts, too."
            )
        if name not in get_args(RecomputedModule):
            raise error(
                f"{of}(recompute={recompute!r}): no module is called {name!r}."
                f"{did_you_mean(str(name), get_args(RecomputedModule))} Choose from: {_choices()}."
            )
    if not names:
        raise error(
            f"{of}(recompute={recompute!r}): use None or 'selective' or 'full', a number of layers of each pipeline"
            f" stage, or a list of modules ({_choices()})."
        )


def transformer_config_arguments(recompute: Recompute | None, modules: list[str]) -> dict[str, Any]:
    """megatron-core's settings.

    Args:
        recompute: What the strategy was given.
        modules: The modules that are recomputed if it is neither "full" nor a number.
    """
    if recompute is None:
        return {}
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if isinstance(recompute, int):
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": recompute}
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def _choices() -> str:
    return ", ".join(map(repr, get_args(RecomputedModule)))
