"""Megatron-LM's settings of the data: files, samples, and documents that share a row."""

from __future__ import annotations

from lightning_megatron.cli.migrate.plan import Given, Plan, take
from lightning_megatron.cli.migrate.settings_table import CONFIG, DATA, MODELS, MODULE


def data(given: Given, plan: Plan) -> None:
    """Carry over the paths of indexed data, their weights, and how samples are cut from them."""
    paths = given.get("data_path")
    if paths is None:
        _leave_to_the_user(given, plan)
        return
    # As megatron-core's get_blend_from_list: an odd number of words are paths, whatever they look like.
    weighted = len(paths) % 2 == 0 and all(map(_is_number, paths[::2]))
    weights = [float(word) for word in paths[::2]] if weighted else None
    plan.put("data.class_path", "lightning_megatron.data.MegatronDataModule")
    plan.put(f"{DATA}.paths", paths[1::2] if weights else paths)
    if weights:
        plan.put(f"{DATA}.weights", weights)
    if given.get("seed"):
        plan.put(f"{DATA}.seed", given["seed"])
    module = str(plan.get("model.class_path", "GPTModule")).rpartition(".")[2]
    samples = next((samples for name, samples in MODELS.values() if name == module), "GPTSamples")
    options = {"seq_length": given.get("seq_length") or given.get("encoder_seq_length") or 1024}
    if samples == "T5Samples" and given.get("decoder_seq_length"):
        options["decoder_seq_length"] = given["decoder_seq_length"]
    if samples == "BertSamples":
        options["binary_head"] = plan.get(f"{CONFIG}.task", "pretraining") == "pretraining"
    masking = {"mask_prob": "masking_probability", "short_seq_prob": "short_sequence_probability"}
    for name, mine in masking.items():
        if given.get(name) is None:
            continue
        if samples == "GPTSamples":
            plan.say(name, given[name], "not needed", "of BERT and T5 alone")
        else:
            options[mine] = given[name]
            plan.say(name, given[name], "carried over", f"{samples}({mine}=)")
    plan.put(f"{DATA}.samples", {"class_path": f"lightning_megatron.data.{samples}", "init_args": options})
    plan.say("data_path", " ".join(paths), "carried over", "MegatronDataModule(paths=, weights=)")
    if given.get("tokenizer_model") is None:
        plan.put(f"{DATA}.tokenizer", "YOUR-TOKENIZER")
        plan.say(
            "tokenizer", None, "yours to do", "data.init_args.tokenizer: a tokenizer.json, or transformers' folder"
        )


def _leave_to_the_user(given: Given, plan: Plan) -> None:
    """Take back what belongs to a data module that the user gives, since there is no ``data_path``."""
    for name in plan.get(DATA, {}).copy():
        says = f"{name} of the data module that you give; there is no data_path"
        plan.take_back(f"{DATA}.{name}", "yours to do", says)
    plan.run.pop("data", None)
    says = "of the data module that you give; there is no data_path"
    take(given, plan, ("mask_prob", "short_seq_prob"), says, fate="yours to do")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def documents(given: Given, plan: Plan) -> None:
    """Carry over what keeps documents apart that share a row; of GPT's samples, or else of the module."""
    names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    samples = plan.get(f"{DATA}.samples.class_path", "")
    if samples.endswith("GPTSamples"):
        place = f"{DATA}.samples.init_args"
        found = take(given, plan, names, "GPTSamples of the data module")
    else:
        place = MODULE
        found = take(given, plan, names, "of the module, with eod_id")
        if any(found.values()) and given.get("eos_token_id") is None:
            plan.put(f"{MODULE}.eod_id", 0)
            plan.say("eod_id", None, "yours to do", "model.init_args.eod_id: the token that ends a document")
    for name, value in found.items():
        plan.put(f"{place}.{name}", value)
