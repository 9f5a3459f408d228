"""Three steps on two pipeline stages; rank 0 prints the losses. Started by ``test_launching.py`` in several ways."""

import json

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_megatron import MegatronStrategy
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.lightning_runs import CONFIG, OurGPT, Rates
from tests.support.trainer import QUIET

if __name__ == "__main__":
    rates = Rates()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=MegatronStrategy(pp=2), max_steps=3, callbacks=[rates], **QUIET
    )
    trainer.fit(OurGPT(CONFIG), DataLoader(Rows(text_samples(CONFIG, 12)), batch_size=4))
    if trainer.is_global_zero:
        print(json.dumps({"by": type(trainer.strategy.cluster_environment).__name__, "losses": rates.losses}))
