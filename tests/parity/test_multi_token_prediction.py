"""Layers that predict the tokens after the next one train as they do in plain PyTorch, however they are divided."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_megatron import Experts, GPTModule, Kernels, LoRA, ParallelLayout
from lightning_megatron.callbacks import TrainingMonitor
from tests.reference import parallel_experts, parallel_gpt
from tests.reference import plain_multi_token_prediction as plain
from tests.reference.parallel_gpt import LoadedGPT, packed_samples, text_samples
from tests.reference.same_training import CLIP, assert_gpt_trained_alike
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import loader, trainer

ROWS, STEPS = 12, 5


@functools.cache
def truth(name: str, packed: bool = False, weigh: bool = True) -> dict:
    config = getattr(plain, name)
    samples = (packed_samples if packed else text_samples)(config, ROWS * STEPS)
    return plain.train(config, samples, ROWS, STEPS, CLIP, weigh)


def assert_trains_alike(name: str, layout: Layout, packed: bool = False, **options: Any) -> None:
    expected = truth(name, packed)
    train = functools.partial(parallel_gpt.train, full=expected["weights"], packed=packed, **options)
    ranks = run_in_pool(layout.world_size, train, getattr(plain, name), layout, ROWS, STEPS, CLIP)
    assert_gpt_trained_alike(ranks, expected)


@pytest.mark.parametrize("name", ["DEEPER", "TIED", "BIASED"])
def test_one_process(name):
    assert truth(name)["losses"][1:] != pytest.approx(truth(name, weigh=False)["losses"][1:], rel=1e-4)
    assert_trains_alike(name, Layout(), micro_batch_size=3)


@pytest.mark.parametrize("name", ["DEEPER", "TIED"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, sp=True),
        Layout(pp=2, dp=2),
        Layout(pp=2, sharded=False),
        Layout(tp=2, pp=2, vp=2),
        Layout(cp=2, dp=2),
        Layout(tp=2, pp=2, cp=2, sp=True),
    ],
    ids=str,
)
def test_trains_as_in_one_process(name, layout):
    assert_trains_alike(name, layout, micro_batch_size=3)


@pytest.mark.parametrize(
    "layout", [Layout(tp=2, pp=2, ep=2, etp=1, sp=True, extra={"layers_per_stage": [3, 2]})], ids=str
)
def test_all_of_deepseek_v3_at_once(layout):
    """Latents, shared and routed experts behind a dense layer, a layer of later tokens, stages of different lengths."""
    expected = truth("DEEPSEEK")
    train = functools.partial(parallel_experts.train, full=expected["weights"], micro_batch_size=3)
    ranks = run_in_pool(layout.world_size, train, plain.DEEPSEEK, layout, ROWS, STEPS, CLIP, timeout=600)
    assert_gpt_trained_alike(ranks, expected)


class OwnLoss(LoadedGPT):
    """Sums up the losses of tokens, which it is given one by one."""

    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        assert output.dim() == 2
        return (output * batch["loss_mask"]).sum(), batch["loss_mask"].sum()


@pytest.mark.parametrize(
    "options",
    [{"recompute": "full"}, {"recompute": "selective"}, {"kernels": Kernels(chunked_loss=False)}, {"kind": OwnLoss}],
    ids=str,
)
def test_with_recomputation_all_logits_and_an_own_loss(options):
    assert_trains_alike("DEEPER", Layout(pp=2), **options)


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2, cp=2)], ids=str)
def test_no_prediction_crosses_into_another_document(layout):
    assert truth("DEEPER", packed=True)["losses"] != truth("DEEPER")["losses"]
    assert_trains_alike("DEEPER", layout, packed=True)


def trained_mixture(layout: Layout) -> dict[str, Any]:
    experts = Experts(num=4, top_k=2, ffn_hidden_size=24, balancing="seq_aux")
    config = replace(plain.DEEPER, experts=experts, num_layers=4, sliding_window=5, sliding_window_layers=[1, 3])
    watch, module = parallel_gpt.Watch(), GPTModule(config)
    callbacks = [watch, TrainingMonitor()]
    run = trainer(
        layout, {"micro_batch_size": 3}, max_steps=3, gradient_clip_val=CLIP, callbacks=callbacks, log_every_n_steps=1
    )
    rows = parallel_gpt.Rows(text_samples(config, ROWS * 3))
    run.fit(module, loader(rows, layout, ROWS, run))
    written = module.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4) if layout.ep == 1 else None
    later = [float(run.callback_metrics[f"mtp_{depth}_loss"]) for depth in (1, 2)]
    return {"losses": watch.losses, "norms": watch.norms, "text": written, "later": later}


def test_layers_of_experts_and_windows():
    (alone,) = run_in_pool(1, trained_mixture, Layout())
    assert alone["later"] == pytest.approx([alone["losses"][-1]] * 2, rel=0.1)  # in nats a token
    assert alone["later"][0] != alone["later"][1]
    for seen in run_in_pool(4, trained_mixture, Layout(pp=2, dp=2, ep=2)):
        assert seen["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert seen["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert seen["later"] == pytest.approx(alone["later"], rel=1e-5)
    for seen in run_in_pool(2, trained_mixture, Layout(pp=2)):
        assert torch.equal(seen["text"], alone["text"])


def goes_on(layout: Layout, steps: int, path: str, saves: bool = False, resumes: bool = False) -> list[float]:
    config = plain.TIED
    module, watch = LoadedGPT(config), parallel_gpt.Watch()
    run = trainer(layout, max_steps=steps, gradient_clip_val=CLIP, callbacks=[watch])
    rows = parallel_gpt.Rows(text_samples(config, ROWS * STEPS))
    run.fit(module, loader(rows, layout, ROWS, run), ckpt_path=path if resumes else None)
    if saves:
        run.save_checkpoint(path)
    return watch.losses


def test_checkpoints_load_under_other_layouts(tmp_path):
    path, whole = str(tmp_path / "half.ckpt"), truth("TIED")["losses"]
    run_in_pool(2, goes_on, Layout(pp=2), 2, path, True)
    for layout in (Layout(), Layout(pp=2), Layout(tp=2, dp=2)):
        for losses in run_in_pool(layout.world_size, goes_on, layout, STEPS, path, False, True):
            assert losses == pytest.approx(whole[2:], rel=1e-5), layout


def test_pretrained_models_take_the_layers_and_exports_leave_them_out(tmp_path):
    config = replace(plain.DEEPER, mtp=0)
    GPTModule(config).save_pretrained(tmp_path / "without", family="llama")
    module = GPTModule.from_pretrained(tmp_path / "without", config={"mtp": 1, "mtp_weight": 0.3})
    module.save_pretrained(tmp_path / "with")
    names = [name for name, _ in module.named_parameters()]
    assert any("mtp_block.layers.0.eh_proj" in name for name in names)
    written, before = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("with", "without"))
    assert written == before
    with pytest.raises(ValueError, match=r"mtp=1\. Use mtp=0"):
        GPTModule(module.config, lora=LoRA()).check_layout(ParallelLayout(world_size=1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"position_embedding": "learned"}, "needs position_embedding='rope'"),
        ({"mtp": -1}, "mtp=-1"),
        ({"mtp": True}, "mtp=True"),
        ({"mtp_weight": -0.1}, "mtp_weight"),
        ({"extra": {"mtp_num_layers": 1}}, r"use GPTConfig\(mtp="),
        ({"layers": "transformer_engine"}, "needs layers='torch'"),
    ],
    ids=str,
)
def test_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        replace(plain.DEEPER, **arguments)


@pytest.mark.parametrize("name", ["DEEPER", "TIED", "BIASED"])
def test_weights_are_counted(name):
    config, one = replace(getattr(plain, name), make_vocab_size_divisible_by=1), ParallelLayout(world_size=1)
    module = GPTModule(config)
    module.build_alone()
    assert sum(p.numel() for p in module.parameters()) == config.parameters(one, config.chunks(one)[0])
