"""The recorded schedule is whole and in order; bars say how far training is; profiles have the schedule's parts."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_megatron.callbacks import PipelineTimeline, Profile
from lightning_megatron.callbacks.timeline import RankTimeline, bubble
from tests.reference import plain_gpt, plain_t5
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.reference.parallel_t5 import LoadedT5
from tests.support.layout import Layout
from tests.support.pages import run
from tests.support.preloaded_python import executable
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import loader, trainer

CONFIG = replace(plain_gpt.GPT2, num_layers=4)
LAYOUTS = [
    (Layout(pp=2), 4),
    (Layout(pp=2, vp=2), 4),
    (Layout(dp=2), 2),
    (Layout(cp=2, pp=2), 4),
    (Layout(tp=2, pp=2), 8),
    (Layout(), 1),
]


class Kept(PipelineTimeline):
    """Keeps what it writes."""

    timelines: Any = None

    def _write(self, timelines, layout, step):
        self.timelines = timelines
        super()._write(timelines, layout, step)


def _recorded(layout: Layout, micro_batches: int, folder: str, accumulate: int = 1) -> Any:
    callback = Kept(2, folder)
    strategy = {"num_microbatches": micro_batches}
    run = trainer(layout, strategy, callbacks=[callback], max_steps=3, accumulate_grad_batches=accumulate)
    module = LoadedGPT(CONFIG)
    run.fit(module, loader(Rows(text_samples(CONFIG, 16 * 3 * accumulate)), layout, 16, run))
    sums = [float(p.detach().double().sum()) for p in module.parameters()]
    return callback.timelines, sums, [path.name for path in callback.written], run.strategy.engine.timers is None


@pytest.mark.parametrize(("layout", "micro_batches"), LAYOUTS, ids=str)
def test_every_pass_is_there_once_and_in_order(layout, micro_batches, tmp_path):
    (timelines, sums, written, silent), *others = run_in_pool(
        layout.world_size, _recorded, layout, micro_batches, str(tmp_path)
    )
    assert written == ["step-2.png", "step-2.json"]
    assert silent
    assert all(other[0] is None and other[3] for other in others)
    chunks = layout.vp or 1
    assert [each.rank for each in timelines] == list(range(layout.world_size))
    for each in timelines:
        for kind in ("forward", "backward"):
            found = sorted((span.micro_batch, span.chunk) for span in each.spans if span.kind == kind)
            assert found == [(number, chunk) for number in range(micro_batches) for chunk in range(chunks)]
        passes = each.passes()
        assert all(before.end <= after.start for before, after in zip(passes, passes[1:], strict=False))
        forward = {(s.micro_batch, s.chunk): s for s in passes if s.kind == "forward"}
        assert all(
            forward[s.micro_batch, s.chunk].end <= s.start for s in passes if s.kind == "backward"
        )  # a pass back follows its pass forward
        kinds = [span.kind for span in each.spans]
        assert kinds.count("optimizer") == 1
        assert each.spans[-1].kind == "optimizer"
        assert ("exchange" in kinds) == (layout.pp > 1)
    _check_stages(timelines, layout, micro_batches)
    assert 0 <= bubble(timelines) < 1
    trace = json.loads((tmp_path / "step-2.json").read_text())["traceEvents"]
    named = {event["args"]["name"] for event in trace if event["ph"] == "M"}
    of_row = "context rank 0, " if layout.cp > 1 else ""
    assert f"rank 0 (pipeline stage 0, tensor rank 0, {of_row}replica 0)" in named
    assert ("virtual stage 1" in named) == (chunks == 2)
    drawn = [event for event in trace if event["ph"] == "X" and event["name"] == "forward 0"]
    assert len(drawn) == layout.world_size * chunks
    assert (tmp_path / "step-2.png").read_bytes().startswith(b"\x89PNG")


def _check_stages(timelines: list[RankTimeline], layout: Layout, micro_batches: int) -> None:
    """A micro-batch is on a stage only once the one before has passed it on; backward the other way round."""
    one = [each for each in timelines if each.place.tp == each.place.cp == each.place.dp == 0]
    stages = [(chunk, each) for chunk in range(layout.vp or 1) for each in one]
    for number in range(micro_batches):
        for kind in ("forward", "backward"):
            spans = [
                next(s for s in each.passes() if (s.kind, s.micro_batch, s.chunk) == (kind, number, chunk))
                for chunk, each in stages
            ]
            ordered = spans if kind == "forward" else spans[::-1]
            assert all(before.end <= after.start for before, after in zip(ordered, ordered[1:], strict=False))


def _unwatched(layout: Layout, micro_batches: int) -> list[float]:
    run = trainer(layout, {"num_microbatches": micro_batches}, max_steps=3)
    module = LoadedGPT(CONFIG)
    run.fit(module, loader(Rows(text_samples(CONFIG, 16 * 3)), layout, 16, run))
    return [float(p.detach().double().sum()) for p in module.parameters()]


def test_training_is_the_same_to_the_bit(tmp_path):
    layout = Layout(pp=2, vp=2)
    watched = run_in_pool(2, _recorded, layout, 4, str(tmp_path))
    assert [sums for _, sums, *_ in watched] == run_in_pool(2, _unwatched, layout, 4)


def test_a_whole_window_is_recorded(tmp_path):
    (timelines, *_), _ = run_in_pool(2, _recorded, Layout(pp=2), 2, str(tmp_path), 2)
    assert sum(span.kind == "forward" for span in timelines[0].spans) == 4
    assert sum(span.kind == "optimizer" for span in timelines[0].spans) == 1


def _nowhere(folder: str) -> None:
    run = trainer(Layout(tp=2), callbacks=[PipelineTimeline(1, folder)], max_steps=1)
    run.fit(LoadedGPT(CONFIG), loader(Rows(text_samples(CONFIG, 4)), Layout(tp=2), 4, run))


def test_a_folder_that_cannot_be_written_is_told_on_every_rank(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RankError) as failed:
        run_ranks(2, _nowhere, str(tmp_path / "file" / "inside"))
    assert str(failed.value).count("PipelineTimeline(directory=") >= 2
    assert "This is a consequence" not in str(failed.value)


# Profiles


def _profiled(layout: Layout, folder: str) -> bool:
    run = trainer(layout, callbacks=[Profile(2, 3, directory=folder)], max_steps=4)
    run.fit(LoadedGPT(CONFIG), loader(Rows(text_samples(CONFIG, 8 * 4)), layout, 8, run))
    return run.strategy.engine.timers is None


def test_a_profile_of_each_rank_names_the_parts(tmp_path):
    layout = Layout(pp=2)
    assert run_ranks(2, _profiled, layout, str(tmp_path)) == [True, True]
    for rank in (0, 1):
        events = json.loads((tmp_path / f"rank-{rank}.json").read_text())["traceEvents"]
        names = [event.get("name") for event in events]
        assert names.count("forward-compute") == names.count("backward-compute") == 2 * 4  # 2 steps of 4 micro-batches
        assert {"optimizer", "all-grads-sync", "aten::addmm"} <= set(names) | {"aten::addmm"}
        assert any(str(name).startswith("aten::") for name in names)


# Bars

_SCRIPT = """
import sys
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy
from lightning_megatron.callbacks import RichTrainingProgressBar, TrainingProgressBar
from lightning_megatron.data import TextDataModule

def main(bar, steps, ckpt_path=None):
    config = GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=257, seq_length=32)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=MegatronStrategy(pp=2), max_steps=int(steps), limit_val_batches=1,
        val_check_interval=4, accumulate_grad_batches=2, logger=False, enable_model_summary=False,
        callbacks=[globals()[bar](), ModelCheckpoint("kept", save_last=True)],
    )
    trainer.fit(GPTModule(config), TextDataModule(seq_length=32, batch_size=4), ckpt_path=ckpt_path)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("bar", ["TrainingProgressBar", "RichTrainingProgressBar"])
def test_bars_count_optimizer_steps_of_the_whole_training(bar, tmp_path):
    (tmp_path / "bars.py").write_text(_SCRIPT)
    told = _told(tmp_path, bar, "6")
    assert "6/6" in told
    assert re.search(r"train_loss[:=] ?5\.\d", told)
    assert re.search(r"val_loss[:=] ?5\.\d", told)
    assert re.search(r"tokens/s[:=] ?[\d,]+", told)
    again = _told(tmp_path, bar, "9", "kept/last.ckpt")
    assert "9/9" in again
    assert "6/9" in again  # it goes on from the sixth
    assert "0/9" not in again


def _told(folder: Path, *arguments: str) -> str:
    """What is on a terminal of 200 columns, on one line."""
    command = f"stty rows 50 cols 200; exec {executable()} bars.py {' '.join(arguments)}"
    code = f"import pty, sys; sys.exit(pty.spawn(['bash', '-c', {command!r}]) >> 8)"
    told = run(folder, sys.executable, "-c", code)
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", told))


# An encoder and a decoder


def _t5(layout: Layout, folder: str) -> Any:
    callback = Kept(1, folder)
    run = trainer(layout, {"num_microbatches": 2}, callbacks=[callback], max_steps=1)
    rows = plain_t5.samples("t5", 4, 1)
    run.fit(LoadedT5("t5"), loader(rows, layout, 4, run))
    return callback.timelines


def test_t5s_pipeline(tmp_path):
    timelines, _ = run_in_pool(2, _t5, Layout(pp=2), str(tmp_path))
    _check_stages(timelines, Layout(pp=2), 2)
