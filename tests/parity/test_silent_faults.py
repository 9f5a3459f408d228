"""Faults where parallelisms meet that raise no error: what trains elsewhere on wrong gradients is right here.

They are megatron-core's, as https://github.com/NVIDIA/Megatron-LM/issues/7452 and others list them, and those that its
users report. ``docs/silent_faults.md`` says which of them cannot occur here.
"""

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.utils.data import DataLoader

from lightning_megatron import GPTConfig, MegatronModule, ModelChunk
from lightning_megatron.models.gpt.layer_spec import gpt_block_spec
from tests.reference import parallel_gpt, plain_gpt
from tests.reference.parallel_gpt import LoadedGPT
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import Logged, loader, trainer

ROWS, STEPS, CLIP = 6, 4, 0.5
SMALL = replace(plain_gpt.GPT2, num_layers=2)


@functools.cache
def truth(name: str) -> dict[str, Any]:
    return plain_gpt.train(CONFIGS[name], parallel_gpt.text_samples(CONFIGS[name], ROWS * STEPS), ROWS, STEPS, CLIP)


def assert_as_plain(name: str, layout: Layout, expected: dict[str, Any] | None = None, **options: Any) -> None:
    expected = expected or truth(name)
    assert max(expected["norms"]) > CLIP, "the truth never clipped, so clipping is not tested"
    train = functools.partial(parallel_gpt.train, full=expected["weights"], **options)
    for seen in run_in_pool(layout.world_size, train, CONFIGS[name], layout, ROWS, STEPS, CLIP):
        assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert seen["distance"] < 1e-5


# Logits that are gathered: the cross-entropy over a divided vocabulary took them for a shard, which adds log(tp)


class Gathered(LoadedGPT):
    """Its output layer gathers the logits, as Megatron's does for evaluation."""

    def build_model(self, *stage: Any) -> Any:
        model = super().build_model(*stage)
        if model.post_process:
            model.parallel_output, model.output_layer.gather_output = False, True
        return model


class GatheredAtRuntime(LoadedGPT):
    """Its batches ask for it."""

    def get_batch(self, batch: Any) -> Any:
        return {**super().get_batch(batch), "runtime_gather_output": True}


class GatheredByMegatron(LoadedGPT):
    """megatron-core's model, with neither our output layer nor our loss."""

    def build_model(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> Any:
        c, core = self.config, self.config.transformer_config(self.build_settings)
        return GPTModel(
            core, gpt_block_spec(core, c, vp_stage), c.vocab_size, c.seq_length, pre_process, post_process,
            parallel_output=False, share_embeddings_and_output_weights=True, vp_stage=vp_stage,
        )  # fmt: skip

    def get_batch(self, batch: Any) -> Any:
        return {**super().get_batch(batch), "attention_mask": None}


@pytest.mark.parametrize("layout", [Layout(tp=2, sp=True), Layout(tp=2, cp=2)], ids=str)
@pytest.mark.parametrize(
    ("name", "kind"), [("odd", Gathered), ("odd", GatheredAtRuntime), ("plain", GatheredByMegatron)]
)
def test_gathered_logits_have_the_loss_of_shards(name, kind, layout):
    assert_as_plain(name, layout, kind=kind)


# Weights that every tensor-parallel rank holds, and sees through its own heads: each rank's gradient is a part


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, cp=2, sp=True), Layout(pp=2, cp=2)], ids=str)
@pytest.mark.parametrize("name", ["qk norm", "qk norm, grouped", "qk without weights"])
def test_norms_of_queries_and_keys(name, layout):
    assert_as_plain(name, layout)


# The learned offset of softmax ("sink"), which heads have each: ranks but the first were left out of the gradient norm


@dataclass(kw_only=True)
class SinkConfig(GPTConfig):
    """Tells the truth that there are sinks."""

    has_sinks: bool = True


class Sinks(LoadedGPT):
    """megatron-core's own core attention, which has them."""

    config_type = SinkConfig  # type: ignore[assignment]

    def build_model(self, *stage: Any) -> Any:
        model = super().build_model(*stage)
        for layer in model.decoder.layers:
            config = replace_fields(layer.self_attention.config, softmax_type="learnable")
            layer.self_attention.core_attention = DotProductAttention(
                config, layer.layer_number, AttnMaskType.causal, "self"
            )
        return model

    def shard_of(self, full: Any, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        if "softmax_offset" not in name:
            return super().shard_of(full, name, parameter)
        return full[name].chunk(self.build_settings.layout.tp)[self.trainer.strategy.tensor_parallel_rank]


def replace_fields(config: Any, **fields: Any) -> Any:
    """A copy without the checks of a new one."""
    copied = object.__new__(type(config))
    vars(copied).update({**vars(config), **fields})
    return copied


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, pp=2, sharded=False)], ids=str)
def test_sinks_count_in_the_norm_and_differ_between_ranks(layout):
    assert_as_plain("sinks", layout, kind=Sinks)


# Context parallelism: a loss is of whole rows, whatever part of one a rank holds


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(tp=2, cp=2, sp=True)], ids=str)
def test_a_mean_of_micro_batches_is_of_whole_rows(layout):
    """Megatron's mean: each rank's own, of as many tokens as it happens to hold, weighs tokens unevenly."""
    config, size = CONFIGS["plain"], 2
    parts = [slice(first, first + size) for first in range(0, ROWS, size)]
    samples = parallel_gpt.text_samples(config, ROWS * STEPS)
    expected = plain_gpt.train(config, samples, ROWS, STEPS, CLIP, parts)
    assert_as_plain("plain", layout, expected, loss_reduction="micro_batch", micro_batch_size=size)


@pytest.mark.parametrize("reduction", ["token", "micro_batch"])
def test_a_part_of_a_row_without_a_label(reduction):
    """The second rank of two has the middle of a row, and in some micro-batches no label at all."""
    config, size = CONFIGS["plain"], 2
    samples = edges_only(parallel_gpt.text_samples(config, ROWS * STEPS))
    in_between = samples["loss_mask"][:, 4:12].sum(dim=1).view(-1, size).sum(dim=1)
    assert 0 < (in_between == 0).sum() < len(in_between)
    parts = [slice(first, first + size) for first in range(0, ROWS, size)] if reduction == "micro_batch" else None
    expected = plain_gpt.train(config, samples, ROWS, STEPS, CLIP, parts)
    options = {"loss_reduction": reduction, "micro_batch_size": size, "kind": EdgesOnly}
    assert_as_plain("plain", Layout(cp=2), expected, **options)


def edges_only(samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels in the first and the last quarter of a row alone; some rows have them in between, too."""
    quarter = samples["loss_mask"].size(1) // 4
    mask = torch.ones_like(samples["loss_mask"])
    mask[samples["tokens"][:, 0] % 4 > 0, quarter:-quarter] = 0
    return {**samples, "loss_mask": mask}


class EdgesOnly(LoadedGPT):
    """The labels of ``edges_only``, made of each batch."""

    def get_batch(self, batch: Any) -> Any:
        return super().get_batch(edges_only(batch))


def evaluate(layout: Layout) -> tuple[float, list[torch.Tensor]]:
    module, data = LoadedGPT(CONFIGS["odd"]), parallel_gpt.Rows(evaluated())
    run = trainer(layout)
    (seen,) = run.validate(module, loader(data, layout, ROWS, run), verbose=False)
    return seen["val_loss"], run.predict(module, loader(data, layout, ROWS, run))


def evaluated() -> dict[str, torch.Tensor]:
    """Two batches, the second one short, of rows whose length no shard divides."""
    samples = parallel_gpt.text_samples(CONFIGS["odd"], 2 * ROWS - 2)
    return {name: value[:, :19] for name, value in samples.items()}


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(pp=2, cp=2), Layout(tp=2, cp=2, sp=True)], ids=str)
def test_evaluation_is_of_whole_rows(layout):
    config, samples = CONFIGS["odd"], evaluated()
    weights = plain_gpt.initial_weights(config)
    loss = plain_gpt.mean_loss(config, weights, samples)
    for seen, predicted in run_in_pool(layout.world_size, evaluate, layout):
        assert seen == pytest.approx(float(loss), rel=1e-5)
        logits = plain_gpt.logits(config, weights, samples["tokens"])
        torch.testing.assert_close(torch.cat(predicted), logits, rtol=0, atol=1e-5)


# Rows that documents share: a stage between the first and the last has to hear of the borders


@dataclass(kw_only=True)
class DocumentsConfig(GPTConfig):
    """Tells the truth where documents end."""

    eod: int = 32  # a space, in ``text_samples``


class OfDocuments(LoadedGPT):
    """Attention within documents, whose positions count from their beginning."""

    config_type = DocumentsConfig  # type: ignore[assignment]

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(
            config, eod_id=config.eod, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True, **options
        )


@functools.cache
def truth_of_documents() -> dict[str, Any]:
    """Each document by itself, in plain PyTorch."""
    config = CONFIGS["documents"]
    weights = {name: w.clone().requires_grad_() for name, w in plain_gpt.initial_weights(config).items()}
    optimizer = torch.optim.AdamW(weights.values(), **plain_gpt.ADAM)
    losses, norms = [], []
    for batch in plain_gpt.batches(parallel_gpt.text_samples(config, ROWS * STEPS), ROWS, STEPS):
        total, count = torch.zeros(()), torch.zeros(())
        for tokens, labels, mask in zip(batch["tokens"], batch["labels"], batch["loss_mask"], strict=True):
            mask = mask * (tokens != config.eod)
            ends = [0, *((tokens == config.eod).nonzero().flatten() + 1).tolist(), len(tokens)]
            for first, end in zip(ends, ends[1:], strict=False):
                if first < end:
                    logits = plain_gpt.logits(config, weights, tokens[None, first:end])[0]
                    total = (
                        total + (F.cross_entropy(logits, labels[first:end], reduction="none") * mask[first:end]).sum()
                    )
            count += mask.sum()
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "weights": {name: w.detach() for name, w in weights.items()}}


@pytest.mark.parametrize("layout", [Layout(pp=4), Layout(pp=2, vp=2, cp=2)], ids=str)
def test_documents_reach_the_middle_stages(layout):
    assert_as_plain("documents", layout, truth_of_documents(), kind=OfDocuments)


# Sums over ranks of tensors that are not contiguous: megatron-core summed a copy


class Views(ModelChunk):
    """A divided layer, whose sum is transposed, and a divided gate of a mean, whose gradient is expanded."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        init = config.init_method
        self.scale = torch.nn.Parameter(torch.ones(8))
        self.up = ColumnParallelLinear(8, 16, config=config, init_method=init, bias=False, gather_output=False)
        self.down = RowParallelLinear(
            16, 8, config=config, init_method=init, bias=False, input_is_parallel=True, skip_bias_add=False
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mean = copy_to_tensor_model_parallel_region(x * self.scale).mean(dim=0)  # [8]
        wide = copy_to_tensor_model_parallel_region(x) @ self.up.weight.t() * (self.up.weight @ mean)  # [b, 16 / tp]
        return reduce_from_tensor_model_parallel_region((wide @ self.down.weight.t()).t()).t()  # [b, 8]


class OfViews(MegatronModule):
    """Starts from ``first_views``."""

    kind: type[Views] = Views

    def build_model(self, pre_process, post_process, vp_stage):
        return self.kind(self.transformer_config(hidden_size=8, num_attention_heads=2))

    def configure_model(self):
        super().configure_model()
        ranks, rank = self.build_settings.layout.tp, self.trainer.strategy.tensor_parallel_rank
        scale, up, down = first_views()
        chunk: Any = self.chunks[0]
        with torch.no_grad():
            chunk.scale.copy_(scale)
            chunk.up.weight.copy_(up.chunk(ranks)[rank])
            chunk.down.weight.copy_(down.chunk(ranks, dim=1)[rank])

    def loss(self, output, batch):
        return (output - batch["y"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), **plain_gpt.ADAM)


def first_views() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) * 0.5 for shape in ((8,), (16, 8), (8, 16))]


def rows() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(5))
    return [{"x": row, "y": row.flip(0)} for row in x]


def train_views(layout: Layout, kind: type[OfViews] = OfViews) -> dict[str, Any]:
    module, watch = kind(), Logged()
    run = trainer(layout, max_epochs=2, callbacks=[watch], use_distributed_sampler=False)
    run.fit(module, DataLoader(rows(), batch_size=4))
    losses, norms = ([step[name] for step in watch.steps] for name in ("train_loss", "grad_norm"))
    return {"losses": losses, "norms": norms, "scale": module.chunks[0].scale.detach().clone()}  # type: ignore[union-attr]


def plain_views() -> dict[str, Any]:
    weights = [weight.requires_grad_() for weight in first_views()]
    scale, up, down = weights
    optimizer = torch.optim.AdamW(weights, **plain_gpt.ADAM)
    losses, norms = [], []
    for batch in list(DataLoader(rows(), batch_size=4)) * 2:
        x = batch["x"]
        wide = F.linear(x, up) * F.linear((x * scale).mean(dim=0), up)
        loss = (F.linear(wide, down) - batch["y"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([weight.grad for weight in weights])))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "scale": scale.detach()}


def test_sums_of_views():
    expected = plain_views()
    for seen in run_in_pool(2, train_views, Layout(tp=2)):
        assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        torch.testing.assert_close(seen["scale"], expected["scale"], rtol=0, atol=1e-5)


class Partial(Views):
    """The scale is seen through divided features, and nobody sums its gradient."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wide = F.linear(x * self.scale, self.up.weight)
        return reduce_from_tensor_model_parallel_region(F.linear(wide, self.down.weight))


class OfPartial(OfViews):
    """Its one weight that is not divided trains apart."""

    kind = Partial


def warned_of(kind: type[OfViews]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_views(Layout(tp=2), kind)
    return [str(each.message) for each in caught if "differ between the tensor-parallel ranks" in str(each.message)]


def test_gradients_of_own_weights_that_are_parts_are_told_of():
    said, silent = run_in_pool(2, warned_of, OfPartial)
    assert len(said) == 1
    assert "gradients of scale differ" in said[0]
    assert "copy_to_tensor_model_parallel_region" in said[0]
    assert not silent  # ranks but the first
    assert run_in_pool(2, warned_of, OfViews) == [[], []]


CONFIGS: dict[str, Any] = {
    "plain": SMALL,
    "odd": replace(plain_gpt.ODD, num_layers=2, seq_length=20),
    "qk norm": replace(SMALL, extra={"qk_layernorm": True}),
    "qk norm, grouped": replace(plain_gpt.LLAMA, num_layers=2, extra={"qk_layernorm": True}),
    "qk without weights": replace(SMALL, extra={"qk_l2_norm": True}),
    "documents": DocumentsConfig(**{**vars(replace(plain_gpt.LLAMA, num_layers=4)), "vocab_size": 128}),
    "sinks": SinkConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=64,
        seq_length=16,
        make_vocab_size_divisible_by=16,
    ),
}
