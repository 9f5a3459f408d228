"""Label smoothing and z-loss are part of the training loss, or refused; never of an evaluation."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule, T5Config, T5Module
from lightning_megatron.distributed.layout import ParallelLayout
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.trainer import trainer

SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 61, "seq_length": 16}
ALONE = ParallelLayout(world_size=1)
FAMILIES = [(GPTModule, GPTConfig), (BertModule, BertConfig), (T5Module, T5Config)]


@pytest.mark.parametrize(("module", "config"), FAMILIES)
@pytest.mark.parametrize("value", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1e-4}], ids=str)
def test_numbers_out_of_range(module, config, value):
    with pytest.raises(ValueError, match=rf"{module.__name__}\({next(iter(value))}=.*a number from 0"):
        module(config(**SIZES), **value)


@pytest.mark.parametrize(("module", "config"), FAMILIES)
def test_they_are_saved_with_the_hyperparameters(module, config):
    made = module(config(**SIZES), label_smoothing=0.1, z_loss=1e-4)
    assert (made.hparams.label_smoothing, made.hparams.z_loss) == (0.1, 1e-4)


@pytest.mark.parametrize("field", ["cross_entropy_loss_fusion", "defer_embedding_wgrad_compute"])
def test_fields_that_want_logits_are_refused(field):
    module = GPTModule(GPTConfig(**SIZES, extra={field: 1}), z_loss=1e-4)
    with pytest.raises(ValueError, match=rf"GPTModule\(z_loss=0.0001\).*extra={{'{field}': 1}}.*Leave one"):
        module.check_layout(ALONE)


@pytest.mark.parametrize(("module", "config"), FAMILIES)
def test_an_own_loss_of_logits_is_refused(module, config):
    class Own(module):
        def loss(self, output, batch):
            return super().loss(output, batch)

    own = Own(config(**SIZES), label_smoothing=0.1)
    Own(config(**SIZES)).check_layout(ALONE)
    if module is GPTModule:  # it is given losses, which have the terms
        own.check_layout(ALONE)
        return
    with pytest.raises(ValueError, match=r"Own\(label_smoothing=0.1\).*overrides `loss`.*do not override"):
        own.check_layout(ALONE)


def test_a_task_without_a_vocabulary_is_refused():
    module = BertModule(BertConfig(**SIZES, task="token_classification", num_labels=2), label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"BertModule\(label_smoothing=0.1\).*task='token_classification' has none"):
        module.check_layout(ALONE)


def test_a_hook_that_wants_logits_is_refused_when_the_model_is_built():
    class Hooked(GPTModule):
        def build_model(self, *args):
            model = super().build_model(*args)
            model.output_layer.register_forward_hook(lambda *_: None)
            return model

    with pytest.raises(ValueError, match=r"Hooked\(z_loss=0.1\): the output layer .* cannot compute it"):
        Hooked(GPTConfig(**SIZES), z_loss=0.1).build()


def run(module):
    config = GPTConfig(**SIZES)
    data = DataLoader(Rows(text_samples(config, 8)), batch_size=4)
    made = trainer(Layout(), max_steps=1, val_check_interval=1, limit_val_batches=1)
    made.fit(module, data, data)
    return made.callback_metrics


def test_an_evaluation_is_plain_and_training_is_not_even_of_a_model_in_eval_mode():
    class Still(GPTModule):
        def configure_model(self):
            super().configure_model()
            for weight in self.parameters():
                weight.data.fill_(0.05)
            self.eval()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    plain, smooth = run(Still(GPTConfig(**SIZES))), run(Still(GPTConfig(**SIZES), label_smoothing=0.1, z_loss=0.1))
    assert smooth["val_loss"] == pytest.approx(float(plain["val_loss"]), rel=1e-6)
    assert smooth["train_loss"] > plain["train_loss"] + 0.1


def test_logits_in_training_are_refused():
    class Own(GPTModule):
        def training_step(self, batch, batch_idx):
            inputs = self.get_batch(batch)
            logits = self.active_model(**{**inputs, "labels": None})
            return logits.float().mean()

    with pytest.raises(RuntimeError, match=r"Logits were asked for in training.*z_loss=0.1"):
        run(Own(GPTConfig(**SIZES), z_loss=0.1))
