"""What autograd keeps of a whole model grows with the length of rows, not with its square, whatever a row hides.

Of four times as many tokens it keeps four times as much; a mask or scores of s² would be sixteen times as many.
"""

import weakref

import pytest
import torch

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule, Kernels, T5Config, T5Module
from lightning_megatron.training.saved_bytes import SavedBytes
from tests.support.built import built

VOCAB, DOCUMENT = 32, 500
SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": VOCAB, "ffn_hidden_size": 8}
PLAIN = Kernels(fused_layers=False, chunked_loss=False).on(torch.device("cpu"))


def ids(length: int) -> torch.Tensor:
    return torch.arange(length)[None] % (VOCAB - 1) + 1


def numbers(length: int) -> torch.Tensor:
    return torch.arange(length)[None] // DOCUMENT


def holes(length: int) -> torch.Tensor:
    return (torch.arange(length)[None] % 7 > 0).long()


def gpt(length: int, **more: torch.Tensor) -> tuple[GPTModule, dict[str, torch.Tensor]]:
    config = GPTConfig(**SIZES, seq_length=length, position_embedding="rope")
    return GPTModule(config), {"input_ids": ids(length), **more}


def bert(length: int, **more: torch.Tensor) -> tuple[BertModule, dict[str, torch.Tensor]]:
    return BertModule(BertConfig(**SIZES, seq_length=length)), {"input_ids": ids(length), "labels": ids(length), **more}


def modern(length: int, **more: torch.Tensor) -> tuple[BertModule, dict[str, torch.Tensor]]:
    """A ModernBERT, whose layer has a window that reaches both ways."""
    config = BertConfig(
        **SIZES,
        seq_length=length,
        position_embedding="rope",
        num_token_types=0,
        norm_placement="embedding_pre",
        activation="geglu",
        sliding_window=64,
    )
    return BertModule(config), {"input_ids": ids(length), "labels": ids(length), **more}


def t5(length: int, **more: torch.Tensor) -> tuple[T5Module, dict[str, torch.Tensor]]:
    config = T5Config(**SIZES, seq_length=length, decoder_seq_length=length)
    return T5Module(config), {"input_ids": ids(length), "labels": ids(length), **more}


CASES = {
    "GPT, documents": lambda n: gpt(n, seq_idx=numbers(n)),
    "GPT, documents with holes": lambda n: gpt(n, seq_idx=numbers(n), attention_mask=holes(n)),
    "BERT, documents": lambda n: bert(n, seq_idx=numbers(n)),
    "BERT, documents with holes": lambda n: bert(n, seq_idx=numbers(n), attention_mask=holes(n)),
    "ModernBERT": lambda n: modern(n),
    "ModernBERT, padded": lambda n: modern(n, attention_mask=(torch.arange(n)[None] < n - 9).long()),
    "ModernBERT, documents with holes": lambda n: modern(n, seq_idx=numbers(n), attention_mask=holes(n)),
    "T5, pairs": lambda n: t5(n, seq_idx=numbers(n), decoder_seq_idx=numbers(n)),
}
WHOLE_ROWS = {
    "GPT, padded": lambda n: gpt(n, attention_mask=(torch.arange(n)[None] < n - 9).long()),
    "GPT, with holes": lambda n: gpt(n, attention_mask=holes(n)),
    "T5, padded": lambda n: t5(n, attention_mask=(torch.arange(n)[None] < n - 9).long()),
}


def kept(case, length: int) -> int:
    """The most bytes at once, in a step on one row."""
    made, batch = case(length)
    module = built(made, kernels=PLAIN)
    with SavedBytes(module.parameters()) as saved:
        module.active_model(**module.get_batch(batch)).float().square().mean().backward()
    return saved.peak


def assert_linear(case, short: int) -> None:
    before, after = kept(case, short), kept(case, 4 * short)
    assert after < 4.1 * before, f"{before} bytes of {short} tokens, {after} of {4 * short}"


@pytest.mark.parametrize("name", CASES)
def test_documents_of_8k_and_32k_tokens(name):
    assert_linear(CASES[name], 8192)


@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_rows_of_one_document(name):
    assert_linear(WHOLE_ROWS[name], 1536)  # attention itself takes four times as long a token


def test_whole_rows_that_a_micro_batch_was_made_of_are_gone_while_the_model_runs():
    module, batch = gpt(16)
    module, alive = built(module, kernels=PLAIN), []
    getting, fitting = module.get_batch, module._fitted

    def noting(given):
        found = getting(given)
        alive.append(weakref.ref(found["loss_mask"]))
        return found

    def sharding(inputs):  # as context parallelism does: tensors of their own
        return {**fitting(inputs), "loss_mask": inputs["loss_mask"].clone()}

    module.get_batch, module._fitted = noting, sharding
    module.active_model.register_forward_pre_hook(lambda *_: alive.append(alive[0]() is None))
    module._chunk_step(batch)
    assert alive[1]
