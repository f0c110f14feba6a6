"""The training of a concept classifier by Lightning: its images, its augmentations and its schedule.

Apart from `ldm.metrics.classify`, since its imports take seconds, and whoever only uses a classifier needs none of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

from ldm.io.errors import MissingFileError
from ldm.io.images import list_images, open_image
from ldm.metrics.classifier_config import ClassifierConfig
from ldm.metrics.classify import Classifier, load_torchvision_weights

Batch = tuple[torch.Tensor, torch.Tensor]  # images (N, 3, H, W) in [-1, 1], classes (N,)
Loaders = tuple[DataLoader[Batch], DataLoader[Batch]]  # of the images to train on, and of those to measure on


class ClassifierTraining(pl.LightningModule):
    """Train a network by SGD at a cyclic rate, as in the paper (arXiv 2402.05947), and measure its accuracy."""

    def __init__(self, network: nn.Module, num_classes: int, max_lr: float):
        super().__init__()
        self.network, self.max_lr = network, max_lr
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        images, labels = batch
        scores = self.network(images.contiguous(memory_format=torch.channels_last))  # (N, classes)
        return F.cross_entropy(scores, labels, label_smoothing=0.05)

    def validation_step(self, batch: Batch, _: int) -> None:
        images, labels = batch
        self.accuracy(self.network(images), labels)
        self.log("accuracy", self.accuracy, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.max_lr, momentum=0.9, weight_decay=5e-4)
        half_cycle = max(1, int(self.trainer.estimated_stepping_batches) // 2)
        scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.0, self.max_lr, step_size_up=half_cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train_transform(image_size: int) -> v2.Compose:
    """Return what training makes of an image: a square of `image_size` pixels in [-1, 1], augmented."""
    return v2.Compose(
        [
            v2.Resize(image_size),
            v2.CenterCrop(image_size),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2, 0.2, 0.02),
            v2.RandomApply([v2.GaussianBlur(3, (0.2, 1.0))], 0.3),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.GaussianNoise(0, 0.02),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


def eval_transform(image_size: int) -> v2.Compose:
    """Return what measuring makes of an image: a square of `image_size` pixels in [-1, 1]."""
    return v2.Compose(
        [
            v2.Resize(image_size),
            v2.CenterCrop(image_size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


def _load_image(path: str) -> Image.Image:
    return open_image(Path(path))


class ClassFolders(ImageFolder):
    """torchvision's folders of one class each, of which those images count that `list_images` counts."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the folders that are not hidden, and each one's place among them."""
        names = sorted(part.name for part in Path(directory).iterdir() if part.is_dir() and part.name[0] != ".")
        return names, {name: place for place, name in enumerate(names)}

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:
        """Return each image's path and class, the classes in order of their names, and so the images of a class."""
        samples: list[tuple[str, int]] = []
        for name, place in class_to_idx.items():
            samples += [(path, place) for path in sorted(map(str, list_images(Path(directory) / name)))]
        return samples


def class_folders(path: Path, num_classes: int, transform: v2.Transform) -> ImageFolder:
    """Return the images below `path`, in folders 0 to `num_classes` - 1, with their classes in order of number.

    Raises MissingFileError when a class has no images, and ValueError when there is a folder that is no class.
    """
    classes = [str(number) for number in range(num_classes)]
    expected = f"there should be {classes[0]} to {classes[-1]}"
    for name in classes:
        try:
            list_images(path / name)
        except MissingFileError as error:
            message = f"{path} lacks images of class {name} ({expected})"
            raise MissingFileError(message, "classifier data") from error
    for part in path.glob("*"):
        if part.is_dir() and part.name not in classes and not part.name.startswith("."):
            raise ValueError(f"{path} has an unexpected folder {part.name} ({expected}): remove it")
    folder = ClassFolders(str(path), transform, loader=_load_image)
    numbers = [int(name) for name in folder.classes]  # sorted by name, '10' before '2'
    folder.target_transform = numbers.__getitem__
    return folder


def data_loaders(data_dir: Path, num_classes: int, config: ClassifierConfig) -> Loaders:
    """Return the loaders of the images in `data_dir`/train and `data_dir`/eval. Raises as `class_folders`."""
    images = class_folders(data_dir / "train", num_classes, train_transform(config.image_size))
    batch_size = min(config.train_batch_size, len(images))
    train = DataLoader(images, batch_size, shuffle=True, drop_last=True)
    held_out = class_folders(data_dir / "eval", num_classes, eval_transform(config.image_size))
    return train, DataLoader(held_out, config.train_batch_size)


def fit(training: ClassifierTraining, loaders: Loaders, epochs: int, device: torch.device) -> float:
    """Train on the first of the loaders; return the accuracy, in [0, 1], on the second."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    train_loader, eval_loader = loaders
    trainer.fit(training, train_loader, eval_loader)
    return float(trainer.callback_metrics["accuracy"])


def train_classifier(
    data_dir: Path,
    classes: Sequence[str],
    config: ClassifierConfig,
    device: torch.device,
    init_weights: Path | None = None,
) -> tuple[Classifier, float]:
    """Train a ResNet18 on `data_dir`/train/{0..}; return it, and its accuracy in [0, 1] on `data_dir`/eval/{0..}.

    `classes[k]` is what class k shows. `init_weights` is a state dict of torchvision's ImageNet ResNet18 to start from;
    without it training is from scratch.

    Raises MissingFileError when a class has no images, and ValueError when there is a folder that is no class or
    `init_weights` is of another network.
    """
    pl.seed_everything(config.seed, verbose=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # no tips, no list of absent accelerators
    loaders = data_loaders(data_dir, len(classes), config)
    network = resnet18()
    if init_weights is not None:
        load_torchvision_weights(network, init_weights)
    network.fc = nn.Linear(network.fc.in_features, len(classes))
    network = network.to(memory_format=torch.channels_last)
    training = ClassifierTraining(network, len(classes), config.max_lr)
    accuracy = fit(training, loaders, config.epochs, device)
    return Classifier(network, config.image_size, classes).eval(), accuracy
