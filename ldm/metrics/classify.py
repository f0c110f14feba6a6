"""Which concept an image shows: a ResNet over class 0, which shows none, and class k + 1 for concept k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.config.concepts import Concept
from ldm.io.checks import check_header, is_count, is_texts
from ldm.io.errors import MissingFileError, notify
from ldm.io.images import image_to_tensor, open_image
from ldm.io.paths import REPO_ROOT
from ldm.io.pickles import UnreadablePickleError, load_torch_pickle
from ldm.io.tensors import load_tensors, save_tensors

CLASSIFIER_FILE_TYPE = "classifier"
# The paper's ImageNet classes of the nine objects, in order.
IMAGENET_CLASSES = (
    491,
    497,
    571,
    0,
    569,
    217,
    574,
    701,
    566,
)
IMAGENET_OBJECTS = (
    "chain saw",
    "church",
    "gas pump",
    "tench",
    "garbage truck",
    "english springer",
    "golf ball",
    "parachute",
    "french horn",
)


class Classifier(nn.Module):
    """A torchvision ResNet with inputs of `image_size` pixels in [-1, 1]; `classes[k]` is what class k shows."""

    def __init__(self, network: nn.Module, image_size: int, classes: Sequence[str] = ()):
        super().__init__()
        self.network, self.image_size, self.classes = network, image_size, tuple(classes)

    def knows(self, concept: Concept) -> bool:
        """Return whether a class shows the concept."""
        return self.class_of(concept) is not None

    def class_of(self, concept: Concept) -> int | None:
        """Return the class that shows the concept, which one of its spellings names; None for none.

        It is k + 1, k being its index, which alone does not say so, since another category's classifier has a class for
        it too. Of a concept that a user named it is any but class 0.
        """
        numbers = range(1, len(self.classes)) if concept.is_own else [concept.index + 1]
        fitting = (k for k in numbers if k < len(self.classes) and concept.is_named(self.classes[k]))
        return None if concept.is_watermark else next(fitting, None)

    @property
    def device(self) -> torch.device:
        """Return the device that the network is on."""
        return next(self.parameters()).device

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the scores (N, classes) of images (N, 3, image_size, image_size) in [-1, 1]."""
        return self.network(images)


class ImageNetObjects(Classifier):
    """torchvision's ImageNet ResNet50 read as the paper does: one ImageNet class for each of the nine objects."""

    concept_classes: torch.Tensor  # (1000,), ImageNet class -> class 1..9, everything else 0
    mean: torch.Tensor  # (3, 1, 1), of ImageNet's pixels in [0, 1]
    std: torch.Tensor  # (3, 1, 1), likewise

    def __init__(self, imagenet_weights: Path):
        from torchvision.models import resnet50

        network = resnet50()
        load_torchvision_weights(network, imagenet_weights)
        super().__init__(network.eval(), 224, ("none", *IMAGENET_OBJECTS))
        concept_classes = torch.zeros(1000, dtype=torch.long)
        concept_classes[list(IMAGENET_CLASSES)] = torch.arange(1, 10)
        self.register_buffer("concept_classes", concept_classes)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return one-hot scores (N, 10) of images (N, 3, 224, 224) in [-1, 1]."""
        predicted = self.network(((images + 1) / 2 - self.mean) / self.std).argmax(1)  # (N,), ImageNet's classes
        return F.one_hot(self.concept_classes[predicted], 10).float()


def load_torchvision_weights(network: nn.Module, path: Path) -> None:
    """Load torchvision's own weights. Raises ValueError when the file is not a state dict of this network."""
    try:
        network.load_state_dict(load_torch_pickle(path, next(network.parameters()).device))
    except (UnreadablePickleError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no state dict of {type(network).__name__} with ImageNet's classes: pass the file that "
            "torchvision's weights come in"
        ) from error


def save_classifier(classifier: Classifier, path: Path, metadata: dict[str, Any]) -> None:
    """Write the network in half precision; the header has `metadata`, with `classes` among it, and the input size."""
    tensors = {}
    for name, value in classifier.network.state_dict().items():
        tensors[name] = value.half() if value.is_floating_point() else value
    save_tensors(path, tensors, CLASSIFIER_FILE_TYPE, metadata | {"size": classifier.image_size})


def classifier_path(category: str) -> Path:
    """Return where the committed classifier of the bundled models' images is."""
    return REPO_ROOT / "models" / "classifiers" / f"{category}.safetensors"


def load_classifier(path: Path, device: torch.device) -> tuple[Classifier, dict[str, Any]]:
    """Return a classifier that `save_classifier` wrote, ready to predict, and its metadata.

    Raises MissingFileError, with the file's stem as the category, when the file is missing or holds no such classifier,
    and ValueError when it is damaged or another kind of file.
    """
    from torchvision.models import resnet18

    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no classifier {path}", "classifier", category=path.stem)
    tensors, metadata = load_tensors(path, CLASSIFIER_FILE_TYPE)
    check_header(path, metadata, {"classes": is_texts, "size": is_count})
    weights = {}
    for name, value in tensors.items():
        weights[name] = value.float() if value.is_floating_point() else value
    try:
        classes, size = metadata["classes"], metadata["size"]
        network = resnet18(num_classes=len(classes))
        network.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        message = f"{path} holds no ResNet18 classifier"
        raise MissingFileError(message, "classifier", category=path.stem) from error
    return Classifier(network, max(1, size), classes).eval().to(device), metadata


def find_classifier(category: str, path: Path | None, device: torch.device) -> Classifier | None:
    """Return the classifier at `path`, else the category's own; None, with a notice, where it has none.

    Raises as `load_classifier`.
    """
    own = classifier_path(category)
    if path is None and not own.is_file():
        notify(f"there is no classifier {own}: accuracy is left empty, unless `classifier` has one")
        return None
    return load_classifier(path or own, device)[0]


@torch.no_grad()
def predict(classifier: Classifier, paths: Sequence[Path], batch_size: int = 64) -> torch.Tensor:
    """Return the most likely class of each image file, (N,) on the CPU."""
    classes = []
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        images = torch.stack([image_to_tensor(open_image(path, classifier.image_size)) for path in batch])
        classes.append(classifier(images.to(classifier.device)).argmax(1).cpu())
    return torch.cat(classes)
