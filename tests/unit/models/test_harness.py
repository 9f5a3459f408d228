"""EleutherAI's harness asks the same of ours and of transformers' model, and hears the same."""

import json

import lm_eval
import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_megatron import AutoModule
from lightning_megatron.models.gpt.lm_eval import HarnessGPT

CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choose.json}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLL = """
task: roll
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choose.json}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choose.json}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "a"
generation_kwargs: {{until: ["b"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """The two models, and the folder of the tasks."""
    folder = tmp_path_factory.mktemp("harness")
    vocabulary = {letter: i for i, letter in enumerate([*LETTERS, "<|endoftext|>"])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="z"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.save(str(folder / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<|endoftext|>")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=27, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3, eos_token_id=26, bos_token_id=26,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    texts = [LETTERS[i : i + 3 + i] for i in range(8)]
    rows = [{"text": text, "choices": ["abc", "xy", "q"], "answer": i % 3} for i, text in enumerate(texts)]
    (folder / "choose.json").write_text("\n".join(map(json.dumps, rows)))
    for name, task in (("choose", CHOOSE), ("roll", ROLL), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(task.format(folder=folder))
    theirs = HFLM(pretrained=model, tokenizer=fast, batch_size=3, max_length=32)
    return HarnessGPT(AutoModule.from_pretrained(model), str(folder / "tokenizer.json"), batch_size=3), theirs, folder


@pytest.mark.slow
@pytest.mark.parametrize("task", ["choose", "roll", "write"])
def test_the_same_is_heard(task, sides):
    ours, theirs, folder = sides
    one, other = (
        lm_eval.simple_evaluate(
            model=model,
            tasks=[str(folder / f"{task}.yaml")],
            bootstrap_iters=0,
            log_samples=True,
        )
        for model in (ours, theirs)
    )
    (mine,), (wanted,) = one["samples"].values(), other["samples"].values()
    assert len(mine) == 8
    for a, b in zip(mine, wanted, strict=True):
        if task == "write":
            assert a["resps"] == b["resps"]
            continue
        flat = [torch.tensor([float(x) for x in torch.utils._pytree.tree_leaves(side["resps"])]) for side in (a, b)]
        torch.testing.assert_close(flat[0], flat[1], rtol=1e-4, atol=1e-4)
