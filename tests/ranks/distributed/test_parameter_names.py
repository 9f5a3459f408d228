"""Names of parameters are the whole model's under every layout, and copies of one weight have one setting."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule, LoRA, T5Config, T5Module
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_ranks
from tests.support.trainer import loader, trainer

ROWS, STEPS = 8, 4
CONFIG = plain_gpt.replace(plain_gpt.GPT2, num_layers=4)
SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32, "seq_length": 8}
STAGES = [Layout(pp=2), Layout(pp=2, vp=2)]


def _models() -> dict[str, Any]:
    return {
        "gpt": GPTModule(GPTConfig(num_layers=4, **SIZES)),
        "lora": GPTModule(GPTConfig(num_layers=4, **SIZES), lora=LoRA(rank=2)),
        "bert": BertModule(BertConfig(num_layers=4, task="pretraining", **SIZES)),
        "t5": T5Module(T5Config(num_layers=4, **SIZES)),
    }


def _names(layouts: list[Layout]) -> dict[str, dict[str, Any]]:
    """By layout and model: the names that the module gives, and its chunks; and the keys of its state."""
    found: dict[str, dict[str, Any]] = {}
    for layout in layouts:
        for kind, module in _models().items():
            run = trainer(layout, max_steps=1)
            module.on_fit_start = functools.partial(_stop, module)
            samples = [{"input_ids": torch.ones(8, dtype=torch.long), "labels": torch.ones(8, dtype=torch.long)}] * 8
            if kind == "bert":
                samples = [{**sample, "next_sentence_label": torch.tensor(1)} for sample in samples]
            with pytest.raises(_Built):
                run.fit(module, torch.utils.data.DataLoader(samples, batch_size=8))
            found.setdefault(str(layout), {})[kind] = {
                "module": [(name, p.requires_grad) for name, p in module.named_parameters()],
                "chunks": [name for chunk in module.chunks for name, _ in chunk.named_parameters()],
                "prefixed": [name for name, _ in module.named_parameters("mine")],
                "keys": sorted(module.state_dict()),
            }
    return found


class _Built(Exception):
    pass


def _stop(module: Any) -> None:
    raise _Built


def test_names_are_the_whole_models_whatever_the_stages():
    (whole,) = run_ranks(1, _names, [Layout()])
    ranks = run_ranks(2, _names, STAGES)
    for layout in STAGES:
        for kind, expected in whole["one"].items():
            seen = [rank[str(layout)][kind] for rank in ranks]
            assert {n for rank in seen for n in rank["module"]} == set(expected["module"]), (layout, kind)
            for rank in seen:
                assert [name for name, _ in rank["module"]] == rank["chunks"]
                assert rank["prefixed"] == [f"mine.{name}" for name, _ in rank["module"]]
                assert all(key.startswith("chunks.") for key in rank["keys"])
    assert any("layers.3." in name for name, _ in whole["one"]["gpt"]["module"])
    assert not any("chunks" in name for name, _ in whole["one"]["gpt"]["module"])


def _setting(name: str) -> dict[str, float]:
    """Layer-wise rates, and no weight decay for the embedding, of which the last stage has a copy."""
    number = re.search(r"layers\.(\d+)\.", name)
    return {
        "lr": 1e-2 * 0.5 ** (int(number[1]) if number else 4),
        "weight_decay": 0.0 if "embedding" in name else 0.5,
    }


class ByName(LoadedGPT):
    """One group for each parameter, by its name; and a weight frozen by name while the optimizer is made."""

    def configure_optimizers(self) -> Any:
        for name, parameter in self.named_parameters():
            if name.startswith("decoder.layers.2.mlp."):
                parameter.requires_grad_(False)
        groups = [{"params": [p], **_setting(n)} for n, p in self.named_parameters() if p.requires_grad]
        return torch.optim.AdamW(groups, **{**plain_gpt.ADAM, "lr": 0.0})


def _train(layout: Layout, full: Any, path: Path) -> dict[str, Any]:
    module, run = ByName(CONFIG), trainer(layout, max_steps=STEPS)
    samples = Rows(text_samples(CONFIG, ROWS * STEPS))
    run.fit(module, loader(samples, layout, ROWS, run))
    run.save_checkpoint(path)
    trained = run.validate(module, loader(samples, layout, ROWS, run), verbose=False)[0]
    other = trainer(layout)
    loaded = other.validate(GPTModule(CONFIG), loader(samples, layout, ROWS, other), ckpt_path=path, verbose=False)[0]
    return {"distance": module.distance(full), "trained": trained["val_loss"], "loaded": loaded["val_loss"]}


def _by_name(parameters: Any) -> Any:
    groups = [{"params": [w], **_setting(n)} for n, w in parameters if not n.startswith("decoder.layers.2.mlp.")]
    optimizer = torch.optim.AdamW(groups, **plain_gpt.ADAM)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _plain(make: Any) -> dict[str, torch.Tensor]:
    """Plain torch's weights after the training, by an optimizer and its scheduler."""
    weights = {name: torch.nn.Parameter(w.clone()) for name, w in plain_gpt.initial_weights(CONFIG).items()}
    optimizer, scheduler = make(weights.items())
    samples = text_samples(CONFIG, ROWS * STEPS)
    for batch in plain_gpt.batches(samples, ROWS, STEPS):
        optimizer.zero_grad()
        plain_gpt.mean_loss(CONFIG, weights, batch).backward()
        optimizer.step()
        scheduler.step()
    return {name: w.detach() for name, w in weights.items()}


@pytest.mark.parametrize("layout", STAGES, ids=str)
def test_settings_by_name_train_as_in_one_process(layout, tmp_path):
    for rank in run_ranks(2, _train, layout, _plain(_by_name), tmp_path / "one.ckpt"):
        # Sums in another order, four steps of Adam with a large eps: some 1e-6.
        assert rank["distance"] < 1e-5
        assert rank["trained"] == rank["loaded"]  # the same numbers in the same order


class ByLayer(LoadedGPT):
    """A group for each layer and one for the rest, under a schedule: three of five on each of two stages."""

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = _by_layer(self.named_parameters())
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _by_layer(parameters: Any) -> Any:
    groups: dict[float, list[Any]] = {}
    for name, parameter in parameters:
        groups.setdefault(_setting(name)["lr"], []).append(parameter)
    together = [{"params": members, "lr": rate} for rate, members in groups.items()]
    optimizer = torch.optim.AdamW(together, **{**plain_gpt.ADAM, "lr": 0.0})
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def _continued(parts: list[tuple[Layout, Path | None, Path | None]], full: Any) -> list[float]:
    """Runs of two steps each, from one checkpoint to another; of those that go on, the distance to the truth."""
    distances = []
    for layout, load, save in parts:
        module, run = ByLayer(CONFIG), trainer(layout, max_steps=STEPS if load else STEPS // 2, max_epochs=-1)
        run.fit(module, loader(Rows(text_samples(CONFIG, ROWS * STEPS)), layout, ROWS, run), ckpt_path=load)
        if save:
            run.save_checkpoint(save)
        else:
            distances.append(module.distance(full))
    return distances


def test_groups_of_stages_come_back_by_their_weights(tmp_path):
    full = _plain(_by_layer)
    one, two = tmp_path / "one.ckpt", tmp_path / "two.ckpt"
    run_ranks(1, _continued, [(Layout(), None, one)], full)
    parts = [(STAGES[0], None, two), (STAGES[0], two, None), (STAGES[1], two, None), (STAGES[0], one, None)]
    for distances in run_ranks(2, _continued, parts, full):
        assert max(distances) < 1e-5, distances  # as above
    assert max(run_ranks(1, _continued, [(Layout(), two, None)], full)[0]) < 1e-5


def _unequal(layout: Layout, what: str) -> None:
    module = LoadedGPT(CONFIG)

    def configure_optimizers() -> Any:
        first = module.global_rank == 0
        odd, rest = [], []
        for name, parameter in module.named_parameters():
            of_kind = "word_embeddings" if layout.pp > 1 else "layers.1.mlp.linear_fc2.weight"
            (odd if of_kind in name else rest).append(parameter)
        if what == "one is left out" and first:
            return torch.optim.AdamW(rest, **plain_gpt.ADAM)
        decay = 0.1 if first else 0.0
        return torch.optim.AdamW([{"params": rest}, {"params": odd, "weight_decay": decay}], **plain_gpt.ADAM)

    module.configure_optimizers = configure_optimizers
    run = trainer(layout, max_steps=1)
    run.fit(module, loader(Rows(text_samples(CONFIG, ROWS)), layout, ROWS, run))


@pytest.mark.parametrize(
    ("layout", "what", "message"),
    [
        (Layout(pp=2), "unequal", "trains embedding.word_embeddings.weight in two ways: pipeline stages 0 and 1"),
        (
            Layout(dp=2),
            "unequal",
            "trains decoder.layers.1.mlp.linear_fc2.weight in two ways: data-parallel ranks 0 and 1",
        ),
        (Layout(tp=2), "unequal", "linear_fc2.weight in two ways: tensor-parallel ranks 0 and 1"),
        (Layout(pp=2), "one is left out", "'embedding.word_embeddings.weight' first"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_unequal_settings_are_refused_on_every_rank(layout, what, message):
    with pytest.raises(RankError, match=message) as error:
        run_ranks(2, _unequal, layout, what, timeout=60)
    assert len(re.findall(rf"Error: .*{message}|Exception: .*{message}", str(error.value))) >= 2
    if what == "unequal":
        assert "weight_decay=0.1 and with weight_decay=0.0" in str(error.value)


def _frozen_on_one_stage(layouts: list[Layout]) -> list[Any]:
    found = []
    for layout in layouts:
        for while_configuring in (False, True):
            module = LoadedGPT(CONFIG)

            def freeze(module: Any = module) -> None:
                if module.trainer.strategy.pipeline_parallel_rank == 1:
                    for name, parameter in module.named_parameters():
                        if "word_embeddings" in name:
                            parameter.requires_grad_(False)

            def configure_optimizers(module: Any = module, freeze: Any = freeze) -> Any:
                freeze()
                return torch.optim.AdamW(module.parameters(), **plain_gpt.ADAM)

            def configure_model(module: Any = module, freeze: Any = freeze) -> None:
                LoadedGPT.configure_model(module)
                freeze()

            name = "configure_optimizers" if while_configuring else "configure_model"
            setattr(module, name, {"configure_optimizers": configure_optimizers}.get(name, configure_model))
            run = trainer(layout, max_steps=2)
            run.fit(module, loader(Rows(text_samples(CONFIG, 2 * ROWS)), layout, ROWS, run))
            full = plain_gpt.initial_weights(CONFIG)
            found.append({n for n, p in module.named_shards() if torch.equal(p.detach(), module.shard_of(full, n, p))})
    return found


def test_one_stages_freezing_holds_for_all_copies():
    first, last = run_ranks(2, _frozen_on_one_stage, STAGES)
    assert first == last == [{"embedding.word_embeddings.weight"}] * 4
