"""Low-rank updates as peft trains them on transformers' models in one process: the truth of ours."""

import copy
import functools
from typing import Any

import peft
import torch

from tests.reference import pretrained
from tests.reference.plain_gpt import ADAM

STEPS = 6
# Targets of each model: some of the parts of a layer, all, and a layer that is stored as one.
TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "qwen3": ["k_proj", "gate_proj"],
    "gemma2": ["q_proj", "up_proj", "down_proj"],
    "gemma3": ["v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "t5": ["q", "v", "wi", "o"],
    "t5-1.1": ["k", "wi_0", "wo"],
    "bert-masked": ["query", "value", "attention.output.dense"],
    "bert-sequences": ["query", "value"],
    "bert-tokens": ["key"],
    "roberta-sequences": ["query", "attention.output.dense"],
    "llama-sequences": ["q_proj", "down_proj"],
    "gpt2-tokens": ["c_attn"],
}


# Of mixtures: layers, and tensors of experts.
MIXTURES: dict[str, tuple[list[str], list[str]]] = {
    "mixtral": (["q_proj", "v_proj", "o_proj"], ["experts.gate_up_proj", "experts.down_proj"]),
    "qwen3_moe": (["k_proj", "o_proj"], ["experts.down_proj"]),
}


# What is trained whole beside the updates, where that is said; of classifiers peft does so unasked.
WHOLE = {"gpt2": ["wpe", "ln_f"], "bert-sequences": ["pooler"]}


TASKS = {"bert-sequences": "SEQ_CLS", "bert-tokens": "TOKEN_CLS", "roberta-sequences": "SEQ_CLS"}
TASKS |= {"llama-sequences": "SEQ_CLS", "gpt2-tokens": "TOKEN_CLS"}


def config(name: str, **options: Any) -> peft.LoraConfig:
    layers, parameters = MIXTURES.get(name) or (TARGETS[name], None)
    return peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=layers, target_parameters=parameters, lora_dropout=0.0,
        modules_to_save=WHOLE.get(name), task_type=TASKS.get(name), **options,
    )  # fmt: skip


@functools.cache
def truth(name: str) -> dict[str, Any]:
    """peft's first updates, its losses and its last updates."""
    torch.manual_seed(3)
    model = peft.get_peft_model(
        copy.deepcopy(pretrained.new_model(name)), config(name, fan_in_fan_out=name.startswith("gpt2"))
    )
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # zeros would hide what becomes of A
            torch.nn.init.normal_(parameter.data, std=0.05)
        elif "modules_to_save" in key:  # what the model itself has would hide what the adapter brings
            parameter.data += torch.randn_like(parameter) * 0.05
    first = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)
    losses = []
    for step in range(STEPS):
        loss = model(**pretrained._batch(name, step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"first": first, "losses": losses, "last": model}
