"""What ``generate`` is asked for: refused on all ranks before a token is written, streamed, padded; and the page."""

import pytest
import torch

from lightning_megatron import GPTConfig, GPTModule
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.build_settings import BuildSettings
from lightning_megatron.models.generation import Prompts
from tests.support import writers
from tests.support.pages import blocks, script, shell

IDS = torch.arange(1, 7).view(2, 3)


@pytest.fixture(scope="module")
def gpt():
    return writers.module("gpt2").build()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0.*whole number from 1"),
        (
            {"max_new_tokens": 100},
            r"prompt of 3 tokens and max_new_tokens=100 are more than the 64.*Use max_new_tokens=61",
        ),
        ({"temperature": 0.5}, r"temperature=0.5\) does nothing without do_sample=True"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5"),
        ({"do_sample": True, "top_k": -1}, "top_k=-1"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
        ({"do_sample": True, "top_p_decay": 0.5}, "top_p_decay=0.5.*does nothing without top_p"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"length_penalty": 2.0}, "does nothing without num_beams above 1"),
        ({"num_beams": 2, "stream": print}, "earlier tokens of beams may change"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0"),
        ({"eos_token_id": 211}, "eos_token_id=211.*ids 0 to 210"),
        ({"input_ids": torch.full((1, 3), 211)}, "token id 211 in the prompts is outside"),
        ({"max_new_tokens": "5"}, "max_new_tokens='5'.*whole number"),
        ({"do_sample": True, "top_k": 2.5}, "top_k=2.5.*whole number"),
        ({"do_sample": True, "temperature": "hot"}, "temperature='hot'.*use a number"),
        ({"input_ids": "hello"}, "input_ids='hello'.*makes no tensor.*tokenizer"),
        ({"input_ids": [[1, 2, 3], [4]]}, "makes no tensor.*padded"),
        ({"input_ids": torch.ones(3)}, r"use token ids \[b, s\]"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, "is empty"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "prompt 1 of 2 is empty"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\)"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused(gpt, arguments, says):
    with pytest.raises(ValueError, match=says):
        gpt.generate(**{"input_ids": IDS, "max_new_tokens": 4, **arguments})


def test_lists_and_arrays_are_prompts_too(gpt):
    expected = gpt.generate(IDS, max_new_tokens=2)
    for prompts in (IDS.tolist(), IDS.numpy()):
        assert torch.equal(gpt.generate(prompts, max_new_tokens=2, attention_mask=[[1, 1, 1]] * 2), expected)


def test_padding_on_either_side_is_the_same(gpt):
    left = writers.prompts("gpt2")
    mask = left["attention_mask"].flip(1)
    order = left["attention_mask"].argsort(dim=1, descending=True, stable=True)
    right = {"input_ids": left["input_ids"].gather(1, order), "attention_mask": mask}
    assert not torch.equal(right["input_ids"], left["input_ids"])
    one, other = (gpt.generate(**prompts, max_new_tokens=6) for prompts in (left, right))
    assert torch.equal(one[:, -6:], other[:, -6:])


def test_a_seed_makes_the_text_and_without_one_it_differs(gpt):
    def write(seed):
        return gpt.generate(IDS, max_new_tokens=8, do_sample=True, seed=seed).tolist()

    assert write(1) == write(1) != write(2)
    assert len({str(write(None)) for _ in range(4)}) > 1


def test_draws_follow_the_probabilities(gpt):
    """2,000 draws of one token against its probabilities; the bound is four standard deviations."""
    ids = IDS[:1].expand(2000, 3)
    drawn = gpt.generate(ids, max_new_tokens=1, do_sample=True, temperature=2.0, top_k=0, seed=3)[:, -1]
    with torch.no_grad():
        expected = (gpt(input_ids=IDS[:1])[0, -1] / 2.0).softmax(-1)
    seen = torch.bincount(drawn, minlength=211) / 2000
    assert ((seen - expected).abs() <= 4 * (expected * (1 - expected) / 2000).sqrt() + 1e-3).all()
    assert (expected > 0.01).sum() > 5


def test_a_module_of_a_checkpoint_writes_and_one_of_a_run_that_is_over_says_why(tmp_path):
    module = GPTModule(GPTConfig(num_layers=1, hidden_size=24, num_attention_heads=6, vocab_size=50, seq_length=16))
    assert module.generate(IDS, max_new_tokens=3).shape == (2, 6)  # built on this process by itself
    module.settings, module.built_for = None, module.built_for
    with pytest.raises(RuntimeError, match="is built already"):
        module.build()


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path):
    write, predict = blocks("generation.md")
    alone = script(tmp_path, write, "write.py").splitlines()
    together = shell(tmp_path, "torchrun --standalone --nproc_per_node 4 write.py 2 2")
    assert together.replace("\n", "").count(alone[0]) == 4  # ranks may write into one another's lines
    assert len(eval(alone[0])[0]) == 16
    assert len([line for line in alone if line.startswith("tensor")]) == 4
    assert "torch.Size([4, 14])" in script(tmp_path, predict)


def test_layers_that_share_out_rows_are_refused():
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32, "seq_length": 16}
    module = GPTModule(GPTConfig(**sizes, layers="transformer_engine"))
    module.settings = BuildSettings(layout=ParallelLayout(world_size=2, cp=2))
    with pytest.raises(ValueError, match="under cp=2, and generation needs whole ones"):
        module._check_prompts(Prompts.of(IDS, None, 32), 3)
