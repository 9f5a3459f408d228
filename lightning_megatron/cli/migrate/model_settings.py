"""Megatron-LM's settings of a model that mean something only together: layers, positions, heads, attention window."""

from __future__ import annotations

from lightning_megatron.cli.migrate.plan import Given, MigrationError, Plan, take
from lightning_megatron.cli.migrate.settings_table import CONFIG, MODELS


def layers_of_stacks(given: Given, plan: Plan) -> None:
    """Layers and lengths of two stacks: a T5's, or of a model that nobody knows yet; others have one."""
    one_stack = any(str(plan.get("model.class_path")).endswith(MODELS[model][0]) for model in ("gpt", "bert"))
    if (layers := depth(given)) is not None:
        plan.put(f"{CONFIG}.num_layers", layers)
    for name in ("num_layers", "encoder_num_layers", "decoder_num_layers", "decoder_seq_length"):
        value = given.get(name)
        if value is None:
            continue
        if one_stack and name.startswith("decoder"):
            plan.say(name, value, "not needed", "of T5 alone")
            continue
        place = "num_layers" if one_stack and name == "encoder_num_layers" else name
        plan.put(f"{CONFIG}.{place}", value)
        plan.say(name, value, "carried over", f"config.{place}", f"{CONFIG}.{place}")


def depth(given: Given) -> int | None:
    """Layers, which of a T5 are the encoder's."""
    return given.get("num_layers") or given.get("encoder_num_layers")


def is_gpt(plan: Plan) -> bool:
    """Whether the model is a GPT that is built from its sizes."""
    return str(plan.get("model.class_path")).endswith(MODELS["gpt"][0])


def positions(given: Given, plan: Plan) -> None:
    """Carry over the kind of positions, the scaling of rotary ones, and the longest sequence."""
    names = {"learned_absolute": "learned", "rope": "rope", "none": "none"}
    kind, place = given.get("position_embedding_type"), f"{CONFIG}.position_embedding"
    if kind is not None and kind not in names:
        plan.say("position_embedding_type", kind, "not here", f"positions are one of {', '.join(names)}")
    elif kind is not None:
        plan.put(place, names[kind])
        plan.say("position_embedding_type", kind, "carried over", "config.position_embedding", place)
    if given.get("use_rotary_position_embeddings") is not None:
        rotary = given["use_rotary_position_embeddings"]
        if rotary:
            plan.put(place, "rope")
        plan.say("use_rotary_position_embeddings", rotary, "carried over", "config.position_embedding", place)
    scaling = ("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor")
    found = take(given, plan, scaling, "config.rope_scaling", f"{CONFIG}.rope_scaling")
    if found.get("use_rope_scaling"):
        # Megatron-LM's RotaryEmbedding: Llama 3.1's rule with its constants, the factor aside.
        plan.put(
            f"{CONFIG}.rope_scaling",
            {"rope_type": "llama3", "factor": given.get("rope_scaling_factor") or 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        )  # fmt: skip
    elif "rotary_seq_len_interpolation_factor" in found:
        factor = found["rotary_seq_len_interpolation_factor"]
        plan.put(f"{CONFIG}.rope_scaling", {"rope_type": "linear", "factor": factor})
    elif found:
        plan.take_back(f"{CONFIG}.rope_scaling", "not needed", "Megatron-LM looks at it only with use_rope_scaling")
    longest, length = given.get("max_position_embeddings"), given.get("seq_length") or given.get("encoder_seq_length")
    if longest is not None and length is not None and longest > length:
        plan.put(f"{CONFIG}.seq_length", longest)
        plan.say("max_position_embeddings", longest, "carried over", "config.seq_length; batches may be shorter")
    elif longest is not None:
        if length is None:
            plan.put(f"{CONFIG}.seq_length", longest)
        plan.say("max_position_embeddings", longest, "carried over", "config.seq_length")


def activation(given: Given, plan: Plan) -> None:
    """Carry over the activation, and with swiglu the width of the feed-forward layer that Megatron-LM chooses."""
    for name, activation in (("swiglu", "swiglu"), ("squared_relu", "squared_relu"), ("openai_gelu", "gelu_tanh")):
        if given.get(name) is not None:
            if given[name]:
                plan.put(f"{CONFIG}.activation", activation)
            plan.say(name, given[name], "carried over", "config.activation")
    if given.get("swiglu") and given.get("ffn_hidden_size") is None and given.get("hidden_size") is not None:
        width = int(4 * given["hidden_size"] * 2 / 3 / 64) * 64
        plan.put(f"{CONFIG}.ffn_hidden_size", width)
        plan.say("ffn_hidden_size", None, "carried over", f"{width}: two thirds with swiglu, by Megatron-LM's rule")


def query_groups(given: Given, plan: Plan) -> None:
    """Carry over the groups of grouped-query attention."""
    if given.get("num_query_groups") is not None and not given.get("group_query_attention"):
        says = "Megatron looks at it only with group_query_attention"
        plan.say("num_query_groups", given["num_query_groups"], "not needed", says)
        return
    place = f"{CONFIG}.num_query_groups"
    found = take(given, plan, ("group_query_attention", "num_query_groups"), "config.num_query_groups", place)
    if found.get("group_query_attention"):
        plan.put(f"{CONFIG}.num_query_groups", found.get("num_query_groups", 1))


def attention_window(given: Given, plan: Plan) -> None:
    """Carry over the sliding window of attention, and which layers have it."""
    window, skips = given.get("window_size"), given.get("window_attn_skip_freq")
    if window is None:
        if skips is not None:
            plan.say("window_attn_skip_freq", skips, "not needed", "Megatron-LM looks at it only with window_size")
        return
    parts = [part for word in window for part in word.strip("()").split(",") if part]
    if len(parts) != 2 or not all(part.lstrip("-").isdigit() for part in parts):
        raise MigrationError(f"window_size={' '.join(window)!r}: use LEFT,RIGHT, such as 128,0.")
    left, right = map(int, parts)
    both_ways = str(plan.get("model.class_path")).endswith(MODELS["bert"][0])
    if (right != left) if both_ways else (right not in (0, -1)):
        shape = "a BERT's window reaches equally far in both directions: N,N" if both_ways else None
        plan.say("window_size", ",".join(parts), "not here", shape or "a window looks back only: LEFT,0")
        return
    place = f"{CONFIG}.sliding_window"
    plan.put(place, left if both_ways else left + 1)
    says = "config.sliding_window" if both_ways else "config.sliding_window counts the token itself"
    plan.say("window_size", ",".join(parts), "carried over", says, place)
    if skips is not None and skips.isdigit() and (layers := depth(given)) is not None:
        place, windowed = f"{CONFIG}.sliding_window_layers", [n for n in range(layers) if (n + 1) % int(skips)]
        plan.put(place, windowed)
        plan.say("window_attn_skip_freq", skips, "carried over", "config.sliding_window_layers", place)
    elif skips is not None:
        says = "config.sliding_window_layers: the numbers, from 0, of the layers that have the window"
        plan.say("window_attn_skip_freq", skips, "yours to do", says)
