"""Lines for an interactive session: classes of its own, several runs of one Trainer. Fed to ``python -i``."""

import json

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy


# fmt: off
class Mine(GPTModule):
    def get_batch(self, batch):
        return super().get_batch(batch)

class Words(Dataset):
    def __len__(self):
        return 32
    def __getitem__(self, i):
        return {"input_ids": (torch.arange(16) * (i % 3 + 1)) % 32}

class Seen(pl.Callback):
    def __init__(self):
        self.losses = []
    def on_train_batch_end(self, trainer, *_):
        self.losses.append(float(trainer.callback_metrics["train_loss"]))

class Broken(Mine):
    def get_batch(self, batch):
        raise OSError("the disk is gone")

# fmt: on
config = GPTConfig(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=32, seq_length=16)
module, data, seen = Mine(config), DataLoader(Words(), batch_size=8), Seen()
best = ModelCheckpoint("kept", monitor="val_loss", filename="best")
options = {"accelerator": "cpu", "devices": 2, "enable_progress_bar": False, "enable_model_summary": False}
logger = CSVLogger("logs")
trainer = pl.Trainer(
    strategy=MegatronStrategy(pp=2), max_epochs=2, logger=logger, callbacks=[seen, best], log_every_n_steps=1, **options
)
trainer.fit(module, data, data)
told = {
    "losses": list(seen.losses),
    "fitted": float(trainer.callback_metrics["val_loss"]),
    "best": best.best_model_path,
    "steps": trainer.global_step,
    "epochs": trainer.current_epoch,
    "log": logger.log_dir,
}
told["validated"] = trainer.validate(module, data, verbose=False)[0]["val_loss"]
told["predicted"] = list(trainer.predict(module, data)[0].shape)
trainer.save_checkpoint("mine")
trainer.fit_loop.max_epochs = 3
trainer.fit(module, data, data)
told.update(steps_after_another_epoch=trainer.global_step, losses_after_another_epoch=list(seen.losses))
told["fitted_again"] = float(trainer.callback_metrics["val_loss"])
other = pl.Trainer(strategy=MegatronStrategy(pp=2), logger=False, **options)
told["by_another_trainer"] = other.validate(module, data, verbose=False)[0]["val_loss"]
told["from_the_copy"] = other.validate(Mine(config), data, ckpt_path="mine", verbose=False, weights_only=False)[0][
    "val_loss"
]
with open("told.json", "w") as file:
    _ = json.dump(told, file)

trainer.fit_loop.max_epochs = 4
trainer.fit(Broken(config), data)
