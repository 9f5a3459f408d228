"""The truth: transformers' BERTs in one process, fp32; and their weights under megatron-core's names."""

import copy
import functools
from typing import Any

import torch
from transformers import BertConfig as HFConfig
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    MegatronBertForPreTraining,
    MegatronBertForSequenceClassification,
)
from transformers import MegatronBertConfig as HFMegatronConfig

from lightning_megatron import BertConfig
from tests.reference import plain_modern_bert
from tests.reference.plain_gpt import ADAM, Weights, mean_with_terms

Batch = dict[str, torch.Tensor]

# Odd sizes: 6 heads, a vocabulary that nothing divides, lengths that tp = 2 does not.
LENGTHS = (37, 23)
SIZES: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "vocab_size": 211,
    "seq_length": LENGTHS[0],
    "make_vocab_size_divisible_by": 8,
}
CONFIGS = {
    "pretraining": BertConfig(**SIZES, task="pretraining"),
    "masked_lm": BertConfig(**SIZES, task="masked_lm"),
    "classes": BertConfig(**SIZES, task="sequence_classification", num_labels=3),
    "several_labels": BertConfig(**SIZES, task="sequence_classification", num_labels=5),
    "one_number": BertConfig(**SIZES, task="sequence_classification", num_labels=1),
    "numbers": BertConfig(**SIZES, task="sequence_classification", num_labels=2, problem_type="regression"),
    "tokens": BertConfig(**SIZES, task="token_classification", num_labels=4),
    "answers": BertConfig(**SIZES, task="question_answering"),
    "pre_norm": BertConfig(**SIZES, task="pretraining", norm_placement="pre"),
    "pre_norm_classes": BertConfig(**SIZES, task="sequence_classification", num_labels=3, norm_placement="pre"),
    "packed": BertConfig(**SIZES, task="masked_lm"),  # rows of three texts, whose borders a batch has
    "packed_tokens": BertConfig(**SIZES, task="token_classification", num_labels=4),
    "modern": BertConfig(**SIZES, **plain_modern_bert.SHAPE, task="masked_lm"),
    "modern_packed": BertConfig(**SIZES, **plain_modern_bert.SHAPE, task="masked_lm"),
    "modern_tokens": BertConfig(**SIZES, **plain_modern_bert.SHAPE, task="token_classification", num_labels=4),
    "modern_mean": BertConfig(
        **SIZES, **plain_modern_bert.SHAPE, task="sequence_classification", num_labels=3, classifier_pooling="mean"
    ),
}
_MODELS: dict[tuple[str, str], Any] = {
    ("pretraining", "post"): BertForPreTraining,
    ("masked_lm", "post"): BertForMaskedLM,
    ("sequence_classification", "post"): BertForSequenceClassification,
    ("token_classification", "post"): BertForTokenClassification,
    ("question_answering", "post"): BertForQuestionAnswering,
    ("pretraining", "pre"): MegatronBertForPreTraining,
    ("sequence_classification", "pre"): MegatronBertForSequenceClassification,
}


@functools.cache
def _model(name: str) -> Any:
    c = CONFIGS[name]
    model = plain_modern_bert.new_model(c) if name.startswith("modern") else _older_model(c)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.1
            is_norm = key.endswith(("LayerNorm.weight", "ln.weight", "norm.weight"))
            parameter.copy_(1 + drawn if is_norm else drawn)
    return model


def _older_model(c: BertConfig) -> Any:
    kind = HFConfig if c.norm_placement == "post" else HFMegatronConfig
    config = kind(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_attention_heads,
        intermediate_size=4 * c.hidden_size,
        max_position_embeddings=c.seq_length,
        layer_norm_eps=c.layernorm_epsilon,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=c.num_labels,
        problem_type=c.problem_type,
        pad_token_id=None,  # or the gradient of that row is left out, which Megatron does not
        attn_implementation="eager",
    )
    return _MODELS[c.task, c.norm_placement](config)


def new_model(name: str) -> Any:
    return copy.deepcopy(_model(name))


def samples(name: str, rows: int, steps: int) -> list[Batch]:
    """``rows * steps`` samples; those of a step have one length, 37 or 23, and are padded raggedly."""
    c, g = CONFIGS[name], torch.Generator().manual_seed(11)
    found = []
    for i in range(rows * steps):
        length = LENGTHS[i // rows % 2]
        real = length - i % 5 * 3  # 0, 3, 6, 9 or 12 tokens less
        ids = torch.randint(1, c.vocab_size, (length,), generator=g)
        place = torch.arange(length)
        sample = {
            "input_ids": ids.where(place < real, 0),
            "attention_mask": (place < real).long(),
            "token_type_ids": ((place > real // 2) & (place < real)).long(),
        }
        sample.update(_answer(i, length, g) if name == "answers" else _labels(c, ids, place < real, g))
        if c.num_token_types == 0:
            del sample["token_type_ids"]
        if "packed" in name:
            sample["cu_seqlens"] = torch.tensor([0, 1 + i % 9, length // 2 + i % 5, length])
        found.append(sample)
    return found


def _labels(c: BertConfig, ids: torch.Tensor, real: torch.Tensor, g: torch.Generator) -> Batch:
    if c.task in ("pretraining", "masked_lm"):
        masked = real & (torch.rand(len(ids), generator=g) < 0.3)
        labels = {"labels": ids.where(masked, -100)}
        if c.task == "pretraining":
            labels["next_sentence_label"] = torch.randint(2, (), generator=g)
        return labels
    if c.task == "token_classification":
        return {"labels": torch.randint(c.num_labels, ids.shape, generator=g).where(real, -100)}
    if c.problem_type == "regression" or c.num_labels == 1:
        return {"labels": torch.randn((c.num_labels,) if c.num_labels > 1 else (), generator=g)}
    if c.num_labels == 5:
        return {"labels": torch.randint(2, (c.num_labels,), generator=g).float()}
    return {"labels": torch.randint(c.num_labels, (), generator=g)}


def _answer(number: int, length: int, g: torch.Generator) -> Batch:
    """Some answers end behind the row, or are wholly behind it; others are said to begin before it."""
    first, last = sorted(torch.randint(0, length, (2,), generator=g).tolist())
    first, last = {3: (length, length), 4: (first, length + 5), 5: (-7, last)}.get(number % 12, (first, last))
    return {"start_positions": torch.tensor(first), "end_positions": torch.tensor(last)}


def batches(name: str, rows: int, steps: int) -> list[Batch]:
    each = samples(name, rows, steps)
    return [
        {key: torch.stack([sample[key] for sample in each[step * rows : (step + 1) * rows]]) for key in each[0]}
        for step in range(steps)
    ]


def _apart(batch: Batch, window: int | None) -> Batch:
    """Texts that share a row, as transformers takes them: positions that begin anew, and a mask of all pairs."""
    batch = dict(batch)
    borders = batch.pop("cu_seqlens", None)
    if borders is None:
        return batch
    places = torch.arange(batch["input_ids"].size(1))
    number = (places[:, None] >= borders[:, None, 1:]).sum(dim=2)  # [b, s]
    seen = (number[:, :, None] == number[:, None]) & (batch["attention_mask"] > 0)[:, None]
    each = plain_modern_bert.masks(seen, window or len(places))
    mask: Any = each["full_attention"] if window is None else each
    return {**batch, "attention_mask": mask, "position_ids": places - borders.gather(1, number)}


def logits(output: Any) -> tuple[torch.Tensor, ...]:
    if "prediction_logits" in output:
        return output.prediction_logits, output.seq_relationship_logits
    if "start_logits" in output:
        return output.start_logits, output.end_logits
    return (output.logits,)


@functools.cache
def train(name: str, rows: int, steps: int, **terms: float) -> dict[str, Any]:
    """Logits of the first batch, then losses and final weights of AdamW; ``terms`` of the masked tokens' loss."""
    model, window = new_model(name), CONFIGS[name].sliding_window
    data = [_apart(batch, window) for batch in batches(name, rows, steps)]
    with torch.no_grad():
        first = logits(model(**data[0]))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses = []
    for batch in data:
        output = model(**batch)
        loss = mean_with_terms(output.logits, batch["labels"], **terms) if terms else output.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "logits": first, "weights": megatron_weights(model)}


_NAMES = {
    "bert.embeddings.word_embeddings": "embedding.word_embeddings",
    "bert.embeddings.position_embeddings": "embedding.position_embeddings",
    "bert.embeddings.token_type_embeddings": "embedding.tokentype_embeddings",
    "bert.embeddings.LayerNorm": "embedding.layer_norm",
    "bert.encoder.ln": "encoder.final_layernorm",
    "bert.pooler.dense": "pooler.dense",
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
    "cls.predictions.decoder": "output_layer",
    "cls.seq_relationship": "binary_head",
    "classifier": "classification_head",
    "qa_outputs": "qa_outputs",
}
_LAYER_NAMES = {
    "attention.output.dense": "self_attention.linear_proj",
    "attention.output.LayerNorm": "self_attn_bda.layer_norm",
    "intermediate.dense": "mlp.linear_fc1",
    "output.dense": "mlp.linear_fc2",
    "output.LayerNorm": "mlp_bda.layer_norm",
    "attention.ln": "input_layernorm",
    "ln": "pre_mlp_layernorm",
}


def megatron_weights(model: Any) -> Weights:
    if model.config.model_type == "modernbert":
        return plain_modern_bert.megatron_weights(model)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    names = dict(_NAMES)
    for n in range(model.config.num_hidden_layers):
        theirs, ours = f"bert.encoder.layer.{n}.", f"encoder.layers.{n}."
        names.update({theirs + a: ours + b for a, b in _LAYER_NAMES.items()})
    weights = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if module in names:
            weights[f"{names[module]}.{leaf}"] = value
    heads = model.config.num_attention_heads
    for n in range(model.config.num_hidden_layers):
        for leaf in ("weight", "bias"):
            three = [state[f"bert.encoder.layer.{n}.attention.self.{x}.{leaf}"] for x in ("query", "key", "value")]
            by_head = torch.stack([x.view(heads, -1, *x.shape[1:]) for x in three], 1)  # [n, 3, head, ...]
            weights[f"encoder.layers.{n}.self_attention.linear_qkv.{leaf}"] = by_head.flatten(0, 2)
    return weights
