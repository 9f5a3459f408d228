"""Every layout trains a T5 as transformers' does in one process; tolerances as in ``test_bert``."""

import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from megatron.core.distributed import DistributedDataParallelConfig
from torch.utils.data import DataLoader
from transformers import BatchEncoding, BertTokenizerFast, DataCollatorForSeq2Seq

from lightning_megatron import Kernels, T5Config, T5Module
from tests.reference import plain_t5
from tests.reference.parallel_t5 import LoadedT5
from tests.reference.same_training import ROWS, STEPS, assert_t5_trains_alike
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_ranks
from tests.support.trainer import Logged, loader, trainer

# Of so many stages the first of the decoder, where each stage of its 3 and 2 layers has one.
SPLITS: dict[int, tuple[int | None, ...]] = {1: (None,), 2: (None,), 3: (1, 2), 4: (2, 3)}


def layouts() -> list[Layout]:
    found = []
    for tp, pp, dp, vp, sp in itertools.product((1, 2), (1, 2, 3, 4), (1, 2), (None, 2), (False, True)):
        if tp * pp * dp <= 4 and not (vp and pp != 2) and not (sp and tp == 1):
            found += [Layout(tp=tp, pp=pp, dp=dp, vp=vp, split=split, sp=sp) for split in SPLITS[pp * (vp or 1)]]
    return found


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_matches_transformers(layout):
    assert_t5_trains_alike("t5", layout)


FEW = [
    Layout(),
    Layout(tp=2, dp=2, sp=True),
    Layout(tp=2, pp=2, sp=True),
    Layout(pp=4, split=3),
    Layout(pp=2, vp=2, split=2),
]


@pytest.mark.parametrize("layout", FEW, ids=str)
@pytest.mark.parametrize("name", ["t5_v1_1", "learned"])
def test_gated_and_untied_or_with_learned_positions(name, layout):
    assert_t5_trains_alike(name, layout)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_and_micro_batches_change_nothing(recompute):
    assert_t5_trains_alike("t5_v1_1", Layout(tp=2, pp=2, sp=True), recompute=recompute, micro_batch_size=3)


PIPELINED = [Layout(tp=2, pp=2, sp=True), Layout(pp=4, split=2), Layout(pp=2, vp=2, split=3, dp=2)]


@pytest.mark.parametrize("layout", PIPELINED, ids=str)
def test_accumulation_is_one_big_batch(layout):
    assert_t5_trains_alike("t5", layout, accumulate=3)


@pytest.mark.parametrize("layout", [Layout(), *PIPELINED[:2], Layout(pp=2, vp=2, split=2)], ids=str)
def test_the_short_last_batch_is_trained_on(layout):
    assert_t5_trains_alike("t5", layout, total=2 * ROWS + 5, num_microbatches=4)  # no pipeline size divides 5


@pytest.mark.parametrize("gather", [False, True], ids=["reduce", "reduce-and-gather"])
def test_overlapped_communication_changes_nothing(gather):
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=gather, bucket_size=4096)
    assert_t5_trains_alike("t5", Layout(pp=2, dp=2), ddp=ddp)


def test_a_replicated_optimizer():
    assert_t5_trains_alike("t5", Layout(pp=3, split=2, sharded=False))


def collate(samples: list[dict]) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(206))]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    return DataCollatorForSeq2Seq(tokenizer)(samples)


def _collated(layout: Layout) -> dict:
    samples = [
        {
            "input_ids": list(range(5, 16 + i % 3)),
            "attention_mask": [1] * (11 + i % 3),
            "labels": list(range(9, 14 + i)),
        }
        for i in range(6)
    ]
    batch = collate(samples)
    with torch.no_grad():
        expected = plain_t5.new_model("t5")(**batch)
    data = DataLoader(samples, batch_size=6, collate_fn=collate)
    run, module = trainer(layout), LoadedT5("t5")
    predicted = run.predict(module, data)[0]
    loss = run.validate(module, data, verbose=False)[0]["val_loss"]
    return {"type": type(batch), "logits": (predicted, expected.logits), "loss": (loss, float(expected.loss))}


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True), Layout(pp=2)], ids=str)
def test_batches_as_transformers_collators_make_them(layout):
    for seen in run_ranks(layout.world_size, _collated, layout):
        assert issubclass(seen["type"], BatchEncoding)  # a Mapping, not a dict
        torch.testing.assert_close(*seen["logits"], rtol=0, atol=1e-5)
        assert seen["loss"][0] == pytest.approx(seen["loss"][1], rel=1e-5)


def with_decoder_inputs(sample: dict) -> dict:
    shifted = torch.nn.functional.pad(sample["labels"][:-1], (1, 0))
    keep = shifted != -100
    keep[2] = False  # a mask that takes something away
    return {**sample, "decoder_input_ids": shifted.clamp(min=0), "decoder_attention_mask": keep.long()}


def megatron(sample: dict) -> dict:
    """The same sample as Megatron's datasets name it."""
    given = with_decoder_inputs(sample)
    keep, keep_targets = given["attention_mask"], given["decoder_attention_mask"]
    counted = sample["labels"] != -100
    targets = len(keep_targets)
    return {
        "text_enc": given["input_ids"],
        "text_dec": given["decoder_input_ids"],
        "labels": sample["labels"].where(counted, 5),
        "loss_mask": counted.long(),
        "enc_mask": torch.outer(keep, keep),
        "dec_mask": torch.ones(targets, targets).tril().long() * keep_targets,
        "enc_dec_mask": keep.expand(targets, -1),
    }


def _losses(layout: Layout, change: Any) -> list[float]:
    run, watch = trainer(layout, max_steps=2), Logged()
    run.callbacks.append(watch)
    samples = [change(sample) for sample in plain_t5.samples("t5", ROWS, 2)]
    run.fit(LoadedT5("t5"), loader(samples, layout, ROWS, run))
    return [step["train_loss"] for step in watch.steps]


@pytest.mark.parametrize("change", [with_decoder_inputs, megatron])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_decoder_inputs_and_masks_that_are_given(layout, change):
    (batch, _) = plain_t5.batches("t5", ROWS, 2)
    rows = [with_decoder_inputs({key: value[i] for key, value in batch.items()}) for i in range(ROWS)]
    with torch.no_grad():
        expected = plain_t5.new_model("t5")(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss
    assert float(expected) != pytest.approx(plain_t5.train("t5", ROWS, STEPS)["losses"][0], rel=1e-5)
    for seen in run_ranks(layout.world_size, _losses, layout, change):
        assert seen[0] == pytest.approx(float(expected), rel=1e-5)


def _dropping(layout: Layout) -> dict:
    module = LoadedT5("t5_v1_1")
    module.config = T5Config(**{**vars(module.config), "hidden_dropout": 0.3, "attention_dropout": 0.3})
    run, watch = trainer(layout, max_steps=3), Logged()
    run.callbacks.append(watch)
    run.fit(module, loader(plain_t5.samples("t5_v1_1", ROWS, 3), layout, ROWS, run))
    alike = {n: p.detach() for n, p in module.named_shards() if not getattr(p, "tensor_model_parallel", False)}
    return {"alike": alike, "losses": [step["train_loss"] for step in watch.steps]}


@pytest.mark.parametrize("sp", [False, True])
def test_dropout_leaves_replicated_weights_alike(sp):
    first, second = run_ranks(2, _dropping, Layout(tp=2, sp=sp))
    assert first["losses"] == second["losses"]
    assert first["losses"][0] != pytest.approx(plain_t5.train("t5_v1_1", ROWS, STEPS)["losses"][0], rel=1e-4)
    for key, value in first["alike"].items():
        torch.testing.assert_close(value, second["alike"][key], rtol=0, atol=1e-7)


def _refused(change: str) -> None:
    samples = plain_t5.samples("t5", ROWS, 1)
    if change == "keys":
        samples = [{"ids": sample["input_ids"]} for sample in samples]
    elif change == "labels":
        samples = [{"input_ids": sample["input_ids"]} for sample in samples]
    elif change == "ids":
        samples[5]["input_ids"][4] = 211
    elif change == "length":
        samples = [{**sample, "input_ids": torch.ones(38, dtype=torch.long)} for sample in samples]
    elif change == "targets":
        samples = [{**sample, "labels": torch.ones(24, dtype=torch.long)} for sample in samples]
    elif change == "inputs":
        samples = [{**sample, "decoder_input_ids": torch.ones(5, dtype=torch.long)} for sample in samples]
    trainer(Layout(pp=2), max_steps=1).fit(LoadedT5("t5"), DataLoader(samples, batch_size=ROWS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("keys", "'text_enc'.*\\['ids'\\]"),
        ("labels", "needs 'labels'"),
        ("ids", "211 in 'input_ids' is outside of 0 to 210"),
        ("length", "'input_ids' has 38 tokens, but T5Config.seq_length=37"),
        ("targets", "'labels' has 24 tokens, but T5Config.decoder_seq_length=23"),
        ("inputs", "'labels' is .12, 23. and 'decoder_input_ids' .12, 5."),
    ],
)
def test_every_rank_says_what_is_wrong(change, message):
    with pytest.raises(RankError, match=message) as error:
        run_ranks(2, _refused, change, timeout=40)
    assert "gave no result" not in str(error.value)


ODD_BATCHES = {
    "decoder_attention_mask": ({"decoder_attention_mask": torch.ones(2, 3)}, "'decoder_attention_mask' is .2, 3."),
    "enc_mask": ({"enc_mask": torch.ones(2, 6)}, r"'enc_mask' is .2, 6.*\(2, 6, 6\) \(\[b, se, se\]\)"),
    "no label": ({"labels": torch.zeros(2, 0, dtype=torch.long)}, "'labels' is .2, 0."),
    "labels of labels": ({"labels": torch.zeros(2, 1, 4, dtype=torch.long)}, "'labels' is .2, 1, 4."),
}


@pytest.mark.parametrize("name", ODD_BATCHES)
def test_odd_batches_are_named(name):
    changes, message = ODD_BATCHES[name]
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(8).view(2, 4), **changes}
    sizes = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "vocab_size": 50, "seq_length": 8}
    module = T5Module(T5Config(**sizes))
    module.trainer = Trainer(accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match=message):
        module.check_batch(batch)


def _first_weights(positions: str) -> dict[str, float]:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 50, "seq_length": 8}
    module, found = T5Module(T5Config(**sizes, position_embedding=positions, init_method_std=0.125)), {}

    def look() -> None:
        for name, weight in module.named_shards():
            if "linear_qkv.weight" in name:
                query, key, value = weight.detach().unflatten(0, (4, 3, 16)).unbind(1)
                found.update({f"{name} q": query.std(), f"{name} k": key.std(), f"{name} v": value.std()})
            if "linear_q.weight" in name:
                found[f"{name} q"] = weight.detach().std()

    module.on_train_start = look
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(4)} for _ in range(2)]
    trainer(Layout(), max_steps=1).fit(module, DataLoader(rows, batch_size=2))
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("positions", ["relative", "learned"])
def test_queries_start_as_t5s(positions):
    """As transformers': queries smaller by the root of a head's size, 16, where their scores are not divided by it."""
    seen = run_ranks(1, _first_weights, positions)[0]
    assert len(seen) == 2 * 3 + 2 * 3 + 2
    for name, std in seen.items():
        smaller = 4 if name.endswith("q") and positions == "relative" else 1
        assert std == pytest.approx(0.125 / smaller, rel=0.1), name


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_the_loss_in_chunks_changes_nothing(layout):
    assert_t5_trains_alike("t5", layout, kernels=Kernels(chunked_loss=True))


def test_label_smoothing_and_z_loss():
    assert_t5_trains_alike("t5", Layout(pp=2), terms={"label_smoothing": 0.1, "z_loss": 0.01})
