"""Train a vision transformer of your own from scratch, with tensor and pipeline parallelism, on a CPU."""

import argparse

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_megatron import LRSchedule, MegatronModule, MegatronStrategy, ModelChunk

SHAPES = ("disc", "ring", "square", "cross", "stripes")


class ViT(ModelChunk):
    """Patches, transformer layers, and a classifier of their mean; each pipeline stage builds its part."""

    def __init__(self, config, image_size, patch_size, num_classes, pre_process, post_process, vp_stage):
        super().__init__(config, pre_process, post_process, vp_stage)
        tokens, width = (image_size // patch_size) ** 2, config.hidden_size
        if pre_process:
            self.patches = torch.nn.Conv2d(1, width, kernel_size=patch_size, stride=patch_size)
            self.positions = torch.nn.Parameter(torch.empty(tokens, 1, width))
            config.init_method(self.positions)
        self.encoder = self.transformer_block(causal=False)
        if post_process:
            self.classifier = torch.nn.Linear(width, num_classes)

    def forward(self, images, labels=None):
        """Logits ``[b, classes]`` on the last stage, hidden states ``[s, b, h]`` for the next one before it."""
        hidden = self.input_tensor  # of the stage before, [s, b, h]
        if self.pre_process:
            patches = self.patches(images.to(self.config.params_dtype)).flatten(2)  # [b, h, s]
            hidden = self.split_sequence(patches.permute(2, 0, 1) + self.positions)
        hidden = self.encoder(hidden, attention_mask=None)
        if not self.post_process:
            return hidden
        return self.classifier(self.join_sequence(hidden).mean(dim=0))  # [b, classes]


class ViTModule(MegatronModule):
    """A vision transformer for classification.

    Args:
        image_size: Rows and columns of an image, in pixels.
        patch_size: Rows and columns of a patch; a patch is a token.
        num_classes: Classes of images.
        num_layers: Transformer layers.
        hidden_size: Width of the hidden states.
        num_attention_heads: Heads of each layer.
        learning_rate: AdamW's.
    """

    def __init__(
        self,
        image_size: int = 24,
        patch_size: int = 6,
        num_classes: int = len(SHAPES),
        num_layers: int = 4,
        hidden_size: int = 64,
        num_attention_heads: int = 4,
        learning_rate: float = 3e-3,
    ):
        super().__init__(
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate),
            lr_schedule=LRSchedule("cosine", warmup_fraction=0.1),
        )
        self.save_hyperparameters()
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def build_model(self, pre_process, post_process, vp_stage):
        """This rank's part of the model; with interleaving, each of its parts."""
        sizes = self.hparams
        config = self.transformer_config(
            num_layers=sizes.num_layers,
            hidden_size=sizes.hidden_size,
            num_attention_heads=sizes.num_attention_heads,
        )
        return ViT(config, sizes.image_size, sizes.patch_size, sizes.num_classes, pre_process, post_process, vp_stage)

    def get_batch(self, batch):
        """The arguments of ``ViT.forward``."""
        images, labels = batch
        return {"images": images, "labels": labels}

    def sequence_length(self, batch):
        """Tokens of an image, for the tensors that pipeline stages exchange."""
        return (self.hparams.image_size // self.hparams.patch_size) ** 2

    def loss(self, output, batch):
        """The mean loss of a micro-batch, on the last stage."""
        return F.cross_entropy(output.float(), batch["labels"])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        """Log the accuracy beside the loss."""
        inputs = self.get_batch(batch)
        output = self.active_model(**inputs)
        if not self.on_last_stage:
            return output  # for the next stage
        self.accuracy(output, inputs["labels"])
        self.log("val_accuracy", self.accuracy, on_epoch=True, prog_bar=True)
        return self.loss(output, inputs)


class Shapes(LightningDataModule):
    """Images of noise with a shape somewhere in them, and which shape it is.

    Args:
        batch_size: Images of a batch.
        train_images: Images to train on.
        val_images: Images to validate on.
        image_size: Rows and columns of an image, in pixels.
    """

    def __init__(self, batch_size: int = 32, train_images: int = 4096, val_images: int = 512, image_size: int = 24):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        """Shuffled batches to train on."""
        images = draw(self.hparams.train_images, self.hparams.image_size, seed=1)
        return DataLoader(images, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        """Other images."""
        images = draw(self.hparams.val_images, self.hparams.image_size, seed=2)
        return DataLoader(images, batch_size=self.hparams.batch_size)

    predict_dataloader = test_dataloader = val_dataloader


def draw(count: int, size: int, seed: int) -> TensorDataset:
    """Images ``[count, 1, size, size]`` and labels ``[count]``, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    centres = size * (0.35 + 0.3 * torch.rand(2, count, 1, 1, generator=generator))
    radius = size * (0.18 + 0.12 * torch.rand(count, 1, 1, generator=generator))
    place = torch.arange(size, dtype=torch.float)
    y, x = place[None, :, None] - centres[0], place[None, None, :] - centres[1]
    square = torch.maximum(x.abs(), y.abs()) <= radius
    distance = (x.square() + y.square()).sqrt()
    shapes = torch.stack(
        [
            distance <= radius,
            (distance <= radius) & (distance >= 0.6 * radius),
            square,
            square & (torch.minimum(x.abs(), y.abs()) <= 0.3 * radius),
            square & ((x + radius).floor() % 4 < 2),
        ]
    )
    images = shapes[labels, torch.arange(count)].float() + 0.2 * torch.randn(count, size, size, generator=generator)
    return TensorDataset(images[:, None], labels)


def main() -> None:
    """Parse the options, train the model, save a checkpoint and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--resume", help="checkpoint to continue from, of any layout")
    parser.add_argument("--output", default="checkpoints/vit-shapes", help="directory for the checkpoint")
    parser.add_argument("--log", help="directory for the curves, as metrics.csv")
    args = parser.parse_args()

    seed_everything(1234)
    module, data = ViTModule(), Shapes()
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=MegatronStrategy(tp=args.tp, pp=args.pp, sequence_parallel=args.sequence_parallel),
        precision=args.precision,
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 4),
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        log_every_n_steps=5,
        enable_checkpointing=False,
        logger=CSVLogger(args.log, name="", version="") if args.log else False,
    )
    trainer.fit(module, data, ckpt_path=args.resume)
    trainer.save_checkpoint(args.output)
    values = dict(trainer.callback_metrics)
    logits = torch.cat(trainer.predict(module, data))  # of all images in their order, on every rank
    if trainer.is_global_zero:
        right = (logits.argmax(dim=1) == data.val_dataloader().dataset.tensors[1]).float().mean()
        print(f"val_accuracy {values['val_accuracy']:.3f} (a guess among {len(SHAPES)} shapes has 0.200)")
        print(f"accuracy of predict {right:.3f}, checkpoint in {args.output}")


if __name__ == "__main__":
    main()
