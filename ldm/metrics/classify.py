"""TODO metrics.classify."""

from __future__ import annotations

from collections.abc import Sequence
import logging
from pathlib import Path
import pickle
import pytorch_lightning as pl
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18, resnet50
from torchvision.transforms import v2
from ldm.io.images import image_to_tensor, is_image, open_image
from ldm.io.paths import REPO_ROOT
from ldm.io.tensors import load_tensors, save_tensors


CLASSIFIER_FILE_TYPE = "classifier"


IMAGENET_CLASSES = (491, 497, 571, 0, 569, 217, 574, 701, 566)  # the paper's ImageNet classes of the nine objects, in order


class Classifier(pl.LightningModule):
    """A torchvision ResNet with `size`-pixel inputs in [-1, 1]; trained with SGD at a cyclic rate as in the paper."""

    def __init__(self, network: nn.Module, classes: int, size: int, lr: float = 0.01):
        super().__init__()
        self.network, self.size, self.lr = network, size, lr
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, size, size) in [-1, 1] -> scores (N, classes)."""
        return self.network(images)

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self(images.contiguous(memory_format=torch.channels_last)), labels, label_smoothing=0.05)

    def validation_step(self, batch, _):
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        half = max(1, int(self.trainer.estimated_stepping_batches) // 2)
        cycle = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.0, self.lr, step_size_up=half)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def _image_folder(path: Path, classes: Sequence[str], transform: v2.Transform) -> ImageFolder:
    """An ImageFolder whose classes are 0..n in order of number. Raises ValueError when one is missing or too many."""
    lacking = [name for name in classes if not any(map(is_image, (path / name).glob("*")))]
    foreign = [part.name for part in path.glob("*") if part.is_dir() and part.name not in classes]
    if lacking or foreign:
        what = f"lacks images of class {lacking[0]}" if lacking else f"has a foreign folder {foreign[0]}"
        raise ValueError(f"{path} {what} (there should be {classes[0]} to {classes[-1]}): "
                         "make them with python eval-scripts/generate-data.py")
    folder = ImageFolder(path, transform, loader=open_image, is_valid_file=is_image)
    number = [int(name) for name in folder.classes]  # ImageFolder sorts '10' before '2'
    folder.target_transform = number.__getitem__
    return folder


def _load_torchvision(network: nn.Module, path: Path) -> None:
    """Load torchvision's own weights. Raises ValueError when the file is not a state dict of this network."""
    try:
        network.load_state_dict(torch.load(path, weights_only=True, map_location=next(network.parameters()).device))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no state dict of {type(network).__name__} with ImageNet's classes: pass the file that "
                         "torchvision's weights come in") from error


def train_classifier(data: Path, names: Sequence[str], size: int, epochs: int, batch: int, lr: float,
                     device: torch.device, weights: Path | None = None, seed: int = 0) -> tuple[Classifier, float]:
    """Train on `data/train/{0..}`, measure on `data/eval/{0..}`; `names[k]` is what class k shows.

    `weights` is a state dict of torchvision's ImageNet ResNet18 to start from; without it training is from scratch.
    Returns the classifier and its accuracy on the eval pictures.
    """
    pl.seed_everything(seed, verbose=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # no tips, no list of absent accelerators
    fit = [v2.Resize(size), v2.CenterCrop(size), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2, 0.02),
           v2.RandomApply([v2.GaussianBlur(3, (0.2, 1.0))], 0.3), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
           v2.GaussianNoise(0, 0.02), v2.Normalize([0.5] * 3, [0.5] * 3)]
    see = [v2.Resize(size), v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
           v2.Normalize([0.5] * 3, [0.5] * 3)]
    classes = [str(k) for k in range(len(names))]
    pictures = _image_folder(data / "train", classes, v2.Compose(fit))
    train = DataLoader(pictures, min(batch, len(pictures)), shuffle=True, drop_last=True)
    held_out = DataLoader(_image_folder(data / "eval", classes, v2.Compose(see)), batch)
    network = resnet18()
    if weights is not None:
        _load_torchvision(network, weights)
    network.fc = nn.Linear(network.fc.in_features, len(names))
    classifier = Classifier(network.to(memory_format=torch.channels_last), len(names), size, lr)
    trainer = pl.Trainer(max_epochs=epochs, accelerator=device.type,
                         devices=1 if device.index is None else [device.index], precision="bf16-mixed",
                         logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(classifier, train, held_out)
    return classifier.eval(), float(trainer.callback_metrics["accuracy"])


def save_classifier(classifier: Classifier, path: Path, recipe: dict) -> None:
    """Write the network in fp16 with its classes and input size."""
    tensors = {name: value.half() if value.is_floating_point() else value
               for name, value in classifier.network.state_dict().items()}
    save_tensors(path, tensors, CLASSIFIER_FILE_TYPE, recipe | {"size": classifier.size})


def classifier_path(category: str) -> Path:
    """Where the committed classifier of the embedded model's world is."""
    return REPO_ROOT / "models" / "classifiers" / f"{category}.safetensors"


def load_classifier(path: Path, device: torch.device, hint: str = "") -> tuple[Classifier, dict]:
    """A saved classifier and its recipe (with `classes`). Raises ValueError when the file is missing or foreign."""
    tensors, recipe = load_tensors(path, CLASSIFIER_FILE_TYPE, hint)
    try:
        network = resnet18(num_classes=len(recipe["classes"]))
        network.load_state_dict({name: value.float() if value.is_floating_point() else value
                                 for name, value in tensors.items()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} holds no ResNet18 classifier: make it with artist-cls-train.py") from error
    return Classifier(network, len(recipe["classes"]), recipe["size"]).eval().to(device), recipe


@torch.no_grad()
def predict(classifier: Classifier, paths: Sequence[Path], batch: int = 64) -> torch.Tensor:
    """The most likely class of each image, (N,) on the CPU."""
    found = []
    for start in range(0, len(paths), batch):
        images = [image_to_tensor(open_image(path, classifier.size)) for path in paths[start:start + batch]]
        found.append(classifier(torch.stack(images).to(classifier.device)).argmax(1).cpu())
    return torch.cat(found)


class ImageNetObjects(Classifier):
    """torchvision's ImageNet ResNet50 read as the paper does: one ImageNet class for each of the nine objects."""

    def __init__(self, weights: Path):
        network = resnet50()
        _load_torchvision(network, weights)
        super().__init__(network.eval(), 1000, 224)
        ids = torch.zeros(1000, dtype=torch.long)
        ids[list(IMAGENET_CLASSES)] = torch.arange(1, 10)
        self.register_buffer("concept", ids)  # ImageNet class -> class 1..9, everything else 0
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.network(((images + 1) / 2 - self.mean) / self.std).argmax(1)
        return F.one_hot(self.concept[found], 10).float()
