"""The truth: a vision transformer of torch's own layers in one process, fp32; and its weights under our names."""

import functools
from typing import Any

import torch
import torch.nn.functional as F

from tests.reference.plain_gpt import ADAM, Weights

SIZES: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "num_classes": 5,
    "num_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 4,
}
TOKENS = 16
ROWS, STEPS, CLIP = 8, 6, 0.5


class PlainViT(torch.nn.Module):
    """As ``examples/train_vit.py``'s, of ``torch.nn.TransformerEncoderLayer``."""

    def __init__(self) -> None:
        super().__init__()
        width, patch, heads = SIZES["hidden_size"], SIZES["patch_size"], SIZES["num_attention_heads"]
        self.patches = torch.nn.Conv2d(1, width, patch, patch)
        self.positions = torch.nn.Parameter(torch.zeros(TOKENS, 1, width))
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, F.gelu, norm_first=True)
            for _ in range(SIZES["num_layers"])
        )
        self.norm = torch.nn.LayerNorm(width)
        self.classifier = torch.nn.Linear(width, SIZES["num_classes"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.patches(images).flatten(2).permute(2, 0, 1) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        return self.classifier(self.norm(hidden).mean(0))


def new_model() -> PlainViT:
    """With weights that are the same at each call, none of them 0 or 1."""
    model, generator = PlainViT(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(1 + drawn if "norm" in name and name.endswith("weight") else drawn)
    return model


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of all steps."""
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(ROWS * STEPS, 1, SIZES["image_size"], SIZES["image_size"], generator=generator)
    return images, torch.randint(SIZES["num_classes"], (ROWS * STEPS,), generator=generator)


@functools.cache
def train() -> dict[str, Any]:
    """Losses, gradient norms before clipping, final weights, and the trained model's logits of all images."""
    model, (images, labels) = new_model(), samples()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses, norms = [], []
    for x, y in zip(images.split(ROWS), labels.split(ROWS), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        logits = model(images)
    return {"losses": losses, "norms": norms, "weights": megatron_weights(model), "logits": logits}


_LAYER_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "pre_mlp_layernorm",
    "self_attn.out_proj": "self_attention.linear_proj",
    "linear1": "mlp.linear_fc1",
    "linear2": "mlp.linear_fc2",
}


def megatron_weights(model: PlainViT) -> Weights:
    """The weights under the names of the parallel model, queries, keys and values head by head."""
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    weights = {key: value for key, value in state.items() if not key.startswith(("layers.", "norm."))}
    for leaf in ("weight", "bias"):
        weights[f"encoder.final_layernorm.{leaf}"] = state[f"norm.{leaf}"]
        for number in range(SIZES["num_layers"]):
            for theirs, ours in _LAYER_NAMES.items():
                weights[f"encoder.layers.{number}.{ours}.{leaf}"] = state[f"layers.{number}.{theirs}.{leaf}"]
            three = state[f"layers.{number}.self_attn.in_proj_{leaf}"].chunk(3)
            by_head = [part.view(SIZES["num_attention_heads"], -1, *part.shape[1:]) for part in three]
            name = f"encoder.layers.{number}.self_attention.linear_qkv.{leaf}"
            weights[name] = torch.stack(by_head, 1).flatten(0, 2)
    return weights
