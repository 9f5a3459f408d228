"""The truth: transformers' T5 in one process, fp32; and its weights under megatron-core's names.

transformers has no T5 with learned positions: here it is composed from its parts.
"""

import copy
import functools
from typing import Any

import torch
from transformers import T5Config as HFConfig
from transformers import T5ForConditionalGeneration

from lightning_megatron import T5Config
from tests.reference.plain_gpt import ADAM, Weights, mean_with_terms

Batch = dict[str, torch.Tensor]

# Odd sizes: 6 heads, a vocabulary that nothing divides, lengths that tp = 2 does not, more layers on one side, and
# distances that reach into the last bucket.
LENGTHS, TARGET_LENGTHS = (37, 23), (23, 17)
SIZES: dict[str, Any] = {
    "num_layers": 3,
    "decoder_num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "kv_channels": 6,
    "ffn_hidden_size": 40,
    "vocab_size": 211,
    "seq_length": LENGTHS[0],
    "decoder_seq_length": TARGET_LENGTHS[0],
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "make_vocab_size_divisible_by": 8,
}
CONFIGS = {
    "t5": T5Config(**SIZES),
    "t5_v1_1": T5Config(**SIZES, activation="geglu_tanh", tie_embeddings=False),
    "learned": T5Config(**SIZES, position_embedding="learned"),
}


@functools.cache
def _model(name: str) -> Any:
    c = CONFIGS[name]
    config = HFConfig(
        vocab_size=c.vocab_size,
        d_model=c.hidden_size,
        d_kv=c.kv_channels,
        d_ff=c.ffn_hidden_size,
        num_layers=c.num_layers,
        num_decoder_layers=c.decoder_num_layers,
        num_heads=c.num_attention_heads,
        relative_attention_num_buckets=c.relative_attention_num_buckets,
        relative_attention_max_distance=c.relative_attention_max_distance,
        dropout_rate=0.0,
        layer_norm_epsilon=c.layernorm_epsilon,
        feed_forward_proj="gated-gelu" if c.is_gated else "relu",
        tie_word_embeddings=c.tie_embeddings,
        decoder_start_token_id=c.decoder_start_id,
        use_cache=False,
        attn_implementation="eager",
    )
    model: Any = T5ForConditionalGeneration(config)
    if not c.tie_embeddings:  # transformers 5 ties what it makes new, and unties what it loads
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    if c.position_embedding == "learned":
        model = WithLearnedPositions(model, c.seq_length)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            size = 0.5 if "relative_attention_bias" in key or "shared" in key else 0.1
            size *= parameter.requires_grad
            drawn = torch.randn(parameter.shape, generator=generator) * size
            parameter.copy_(1 + drawn if key.endswith("layer_norm.weight") else drawn)
    return model


class WithLearnedPositions(torch.nn.Module):
    """A table of positions, added to the embeddings of both stacks; no bias, and scores that are scaled."""

    def __init__(self, t5: Any, length: int) -> None:
        super().__init__()
        self.t5 = t5
        self.config = t5.config
        self.positions = torch.nn.Embedding(length, t5.config.d_model)
        for key, part in t5.named_modules():
            if key.endswith("relative_attention_bias"):
                part.weight.requires_grad_(False)
            elif key.endswith(".q"):
                part.register_forward_hook(lambda _, __, q: q * self.config.d_kv**-0.5)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **masks: torch.Tensor) -> Any:
        targets = self.t5.prepare_decoder_input_ids_from_labels(labels)
        return self.t5(
            inputs_embeds=self._embed(input_ids), decoder_inputs_embeds=self._embed(targets), labels=labels, **masks
        )

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.t5.shared(ids) + self.positions.weight[: ids.size(1)]


def new_model(name: str) -> Any:
    return copy.deepcopy(_model(name))


def samples(name: str, rows: int, steps: int) -> list[Batch]:
    """``rows * steps`` samples; those of a step have one length on each side, and are padded raggedly."""
    c, g = CONFIGS[name], torch.Generator().manual_seed(11)
    found = []
    for i in range(rows * steps):
        length, targets = LENGTHS[i // rows % 2], TARGET_LENGTHS[i // rows % 2]
        ids = torch.randint(1, c.vocab_size, (length,), generator=g)
        labels = torch.randint(1, c.vocab_size, (targets,), generator=g)
        real = torch.arange(length) < length - i % 5 * 3
        counted = torch.arange(targets) < targets - i % 4 * 2
        found.append(
            {"input_ids": ids.where(real, 0), "attention_mask": real.long(), "labels": labels.where(counted, -100)}
        )
    return found


def batches(name: str, rows: int, steps: int, total: int | None = None) -> list[Batch]:
    """Those of the first ``total`` samples; the last may be short."""
    each = samples(name, rows, steps)[:total]
    return [
        {key: torch.stack([sample[key] for sample in each[start : start + rows]]) for key in each[0]}
        for start in range(0, len(each), rows)
    ]


@functools.cache
def train(name: str, rows: int, steps: int, total: int | None = None, **terms: float) -> dict[str, Any]:
    """Logits of the first batch, then losses, gradient norms and final weights of AdamW; ``terms`` of the loss."""
    model, data = new_model(name), batches(name, rows, steps, total)
    with torch.no_grad():
        first = model(**data[0]).logits
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses, norms = [], []
    for batch in data:
        output = model(**batch)
        loss = mean_with_terms(output.logits, batch["labels"], **terms) if terms else output.loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
        losses.append(float(loss.detach()))
    weights, before = megatron_weights(model), megatron_weights(new_model(name))
    moved = max(float((weights[key] - before[key]).abs().max()) for key in weights)
    return {"losses": losses, "norms": norms, "logits": first, "weights": weights, "moved": moved}


def megatron_weights(model: Any) -> Weights:
    state = {key.removeprefix("t5."): value.detach().clone() for key, value in model.state_dict().items()}
    heads = model.config.num_heads
    weights = {"embedding.word_embeddings.weight": state["shared.weight"]}
    if "positions.weight" in state:
        weights["embedding.position_embeddings.weight"] = state["positions.weight"]
    if not torch.equal(state["lm_head.weight"], state["shared.weight"]):
        weights["output_layer.weight"] = state["lm_head.weight"]
    for stack in ("encoder", "decoder"):
        weights[f"{stack}.final_layernorm.weight"] = state[f"{stack}.final_layer_norm.weight"]
        if "positions.weight" not in state:
            bias = state[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
            weights[f"{stack}_relative_pos_emb.relative_attention_bias.weight"] = bias
    for stack, count in (("encoder", model.config.num_layers), ("decoder", model.config.num_decoder_layers)):
        for n in range(count):
            _layer(weights, state, f"{stack}.block.{n}.layer.", f"{stack}.layers.{n}.", heads, stack == "decoder")
    return weights


def _layer(weights: Weights, state: Weights, theirs: str, ours: str, heads: int, crosses: bool) -> None:
    def by_head(attention: str, names: str) -> torch.Tensor:
        parts = [
            state[f"{theirs}{attention}.{x}.weight"].view(heads, -1, state["shared.weight"].size(1)) for x in names
        ]
        return torch.stack(parts, 1).flatten(0, 2)  # [n, 2 or 3, head, h]

    weights[f"{ours}input_layernorm.weight"] = state[f"{theirs}0.layer_norm.weight"]
    weights[f"{ours}self_attention.linear_qkv.weight"] = by_head("0.SelfAttention", "qkv")
    weights[f"{ours}self_attention.linear_proj.weight"] = state[f"{theirs}0.SelfAttention.o.weight"]
    if crosses:
        weights[f"{ours}pre_cross_attn_layernorm.weight"] = state[f"{theirs}1.layer_norm.weight"]
        weights[f"{ours}cross_attention.linear_q.weight"] = state[f"{theirs}1.EncDecAttention.q.weight"]
        weights[f"{ours}cross_attention.linear_kv.weight"] = by_head("1.EncDecAttention", "kv")
        weights[f"{ours}cross_attention.linear_proj.weight"] = state[f"{theirs}1.EncDecAttention.o.weight"]
    feed = f"{theirs}{2 if crosses else 1}."
    weights[f"{ours}pre_mlp_layernorm.weight"] = state[f"{feed}layer_norm.weight"]
    first = [value for key, value in state.items() if key.startswith(f"{feed}DenseReluDense.wi")]
    weights[f"{ours}mlp.linear_fc1.weight"] = torch.cat(first)
    weights[f"{ours}mlp.linear_fc2.weight"] = state[f"{feed}DenseReluDense.wo.weight"]
