"""Small GPTs of transformers with heads for labels, on padded rows; and how each is trained in one process."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from lightning_megatron import AutoModule
from tests.reference import pretrained
from tests.reference.plain_gpt import ADAM
from tests.support.layout import Layout
from tests.support.trainer import Logged, loader, trainer

LENGTH, ROWS, STEPS = 37, 8, 10  # sequence and context parallelism divide none of such a length
_SIZES = {
    "vocab_size": pretrained.VOCAB, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True}
_MIXTURE = {**_SIZES, "num_local_experts": 6, "num_experts_per_tok": 3}
MODELS = {
    "classes": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_SIZES, num_labels=3)),
    "number": lambda: hf.Qwen3ForSequenceClassification(hf.Qwen3Config(**_SIZES, head_dim=12, num_labels=1)),
    "several": lambda: hf.MixtralForSequenceClassification(hf.MixtralConfig(**_MIXTURE, num_labels=5)),
    "answers": lambda: hf.Qwen3MoeForQuestionAnswering(hf.Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=12)),
    "tokens": lambda: hf.MistralForTokenClassification(
        hf.MistralConfig(**_SIZES, sliding_window=7, num_labels=4, classifier_dropout=0.0)
    ),
}


@functools.cache
def new_model(name: str) -> Any:
    torch.manual_seed(len(name))
    model = MODELS[name]().eval()
    model.config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.1)
    return model


def samples(name: str) -> list[dict[str, torch.Tensor]]:
    """Rows with padding behind, in front and nowhere; in front of no text with an answer, which may lie in padding."""
    generator = torch.Generator().manual_seed(5)
    return [_sample(name, number, generator) for number in range(ROWS * STEPS)]


def _sample(name: str, number: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    places, padding = torch.arange(LENGTH), (0, 5, 9, 30)[number % 4]
    answers = name == "answers"
    real = places >= padding if number % 8 > 3 and not answers else places < LENGTH - padding
    ids = torch.where(real, 1 + draw(pretrained.VOCAB - 1, LENGTH), int(answers))  # 0 has no gradient in transformers
    labels = {
        "classes": lambda: {"labels": draw(3, 1)[0]},
        "number": lambda: {"labels": torch.randn((), generator=generator)},
        "several": lambda: {"labels": draw(2, 5).float()},
        "tokens": lambda: {"labels": draw(4, LENGTH).where(real, -100)},
        # Some begin or end behind the row, which transformers does not count.
        "answers": lambda: {key: draw(LENGTH + 4, 1)[0] for key in ("start_positions", "end_positions")},
    }[name]()
    return {"input_ids": ids, "attention_mask": real.long(), **labels}


def batch(name: str, step: int) -> dict[str, torch.Tensor]:
    rows = samples(name)[step * ROWS : (step + 1) * ROWS]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def counted(name: str, logits: torch.Tensor) -> torch.Tensor:
    """Those of the first batch that belong to no padding."""
    return logits[batch(name, 0)["attention_mask"].bool()] if name == "tokens" else logits


def _joined(output: Any) -> torch.Tensor:
    """The logits, ``[..., 2]`` of begin and end."""
    return torch.stack(pretrained.logits_in(output), -1) if "start_logits" in output else output.logits


@functools.cache
def truth(name: str) -> dict[str, Any]:
    """What transformers' model gives, and what it is after training with plain AdamW."""
    model = copy.deepcopy(new_model(name))
    with torch.no_grad():
        before = _joined(model(**batch(name, 0)))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(**batch(name, step)).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
        losses.append(loss.item())
    return {"logits": counted(name, before), "losses": losses, "norms": norms, "weights": model.state_dict()}


def run_on_rank(names: list[str], layout: Layout, folder: Path) -> dict[str, Any]:
    """Each model in turn: logits, training, a loss of evaluation, and a directory after it; on this rank."""
    return {name: _run_one(name, layout, folder / name) for name in names}


def _run_one(name: str, layout: Layout, folder: Path) -> dict[str, Any]:
    module = AutoModule.from_pretrained(new_model(name), optimizer=functools.partial(torch.optim.AdamW, **ADAM))
    logged = Logged()
    run = trainer(layout, max_steps=STEPS, callbacks=[logged])
    rows = loader(samples(name)[:ROWS], layout, ROWS, run)
    parts = run.predict(module, rows)
    predicted = torch.cat([torch.stack(part, -1) if isinstance(part, tuple) else part for part in parts])
    (tested,) = run.test(module, rows, verbose=False)
    run.fit(module, loader(samples(name), layout, ROWS, run))
    module.save_pretrained(folder)
    return {
        "logits": predicted,
        "tested": tested["test_loss"],
        "losses": [step["train_loss"] for step in logged.steps],
        "norms": [step["grad_norm"] for step in logged.steps],
    }
