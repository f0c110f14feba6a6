import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import save_tensors
from ldm.images import Case, write_cases
from ldm.metrics.classify import IMAGENET, KIND, ImageNetObjects, load_classifier, predict, save_classifier, train_classifier
from ldm.metrics.compare import accuracy_table, by_concept, compare, pairs
from ldm.metrics.perceptual import distances

from conftest import CPU

LPIPS_OF_NOISE = 0.104343  # two pictures of noise, by lpips 0.1.4 with torchvision's AlexNet
COLOURS = {0: "gray", 1: "red", 2: "blue"}


def colours(folder, count, classes=3):
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        for n in range(count):
            base = np.array(Image.new("RGB", (32, 32), COLOURS[label]), dtype=float)
            noisy = np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / str(label) / f"{n}_0.png")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    data = tmp_path_factory.mktemp("colours")
    colours(data / "train", 24)
    colours(data / "eval", 4)
    trained, accuracy = train_classifier(data, ["blank", "a", "b"], 32, 12, 12, 0.02, CPU)
    assert accuracy == 1.0
    path = data / "c.safetensors"
    save_classifier(trained, path, {"classes": ["blank", "a", "b"]})
    return load_classifier(path, CPU)[0], data


def test_a_trained_classifier_tells_classes_apart_after_a_file_in_half_precision(classifier):
    model, data = classifier
    assert all((predict(model, sorted((data / "eval" / str(k)).iterdir())) == k).all() for k in range(3))


def test_missing_classes_name_the_command(tmp_path):
    with pytest.raises(ValueError, match="class 0.*generate-data.py"):
        train_classifier(tmp_path, ["blank", "a"], 32, 1, 4, 0.1, CPU)
    colours(tmp_path / "train", 1)
    with pytest.raises(ValueError, match="foreign folder 2"):
        train_classifier(tmp_path, ["blank", "a"], 32, 1, 4, 0.1, CPU)


def test_what_is_no_classifier_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "w.pth")
    save_tensors(tmp_path / "c.safetensors", {"fc.weight": torch.zeros(1)}, KIND, {"classes": ["a"], "size": 32})
    with pytest.raises(ValueError, match="no state dict of ResNet"):
        ImageNetObjects(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no ResNet18 classifier"):
        load_classifier(tmp_path / "c.safetensors", CPU)


def test_imagenet_classes_are_read_as_the_papers_objects(tmp_path):
    from torchvision.models import resnet50
    network = resnet50()
    torch.nn.init.zeros_(network.fc.weight)
    network.fc.bias.data = torch.nn.functional.one_hot(torch.tensor(IMAGENET[3]), 1000).float()
    torch.save(network.state_dict(), tmp_path / "r50.pth")
    found = ImageNetObjects(tmp_path / "r50.pth").eval()(torch.zeros(1, 3, 224, 224))
    assert found.argmax(1).item() == 4  # tench, concept 3


def test_lpips_is_the_published_network(tmp_path):
    """Zero for equal pictures, symmetric, and the value that lpips 0.1.4 gives with torchvision's AlexNet."""
    rng = np.random.default_rng(7)
    for k in range(2):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    a, b = tmp_path / "0.png", tmp_path / "1.png"
    found = distances([a, a, b], [a, b, a], CPU)
    assert found["lpips"][0] == 0 and found["pixel"][0] == 0 and torch.isinf(found["psnr"][0])
    assert found["lpips"][1] == pytest.approx(found["lpips"][2].item(), abs=1e-6)
    assert found["lpips"][1] == pytest.approx(LPIPS_OF_NOISE, abs=1e-5)
    for side in (40, 16):
        Image.new("RGB", (side, side)).save(tmp_path / "2.png")
        with pytest.raises(ValueError, match="--image_size"):
            distances([a if side == 40 else tmp_path / "2.png"], [tmp_path / "2.png"], CPU)


def test_pixel_difference_and_psnr_are_those_of_the_definition(tmp_path):
    first = np.zeros((64, 64, 3), np.uint8)
    second = first.copy()
    second[5, 6, 1] = 51
    for name, pixels in (("a.png", first), ("b.png", second)):
        Image.fromarray(pixels).save(tmp_path / name)
    found = distances([tmp_path / "a.png"], [tmp_path / "b.png"], CPU)
    assert found["pixel"].item() == 51
    assert found["psnr"].item() == pytest.approx(10 * np.log10(255**2 * 64 * 64 * 3 / 51**2), abs=1e-2)


def test_folders_pair_by_name_in_class_folders_or_not(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b" / "0").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0_0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "0" / "0_0.png")
    assert len(pairs(tmp_path / "a", tmp_path / "b")) == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "1_0.png")
    with pytest.raises(ValueError, match="1_0.png is in only one"):
        pairs(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "1").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "1" / "0_0.png")
    with pytest.raises(ValueError, match="have the same name"):
        pairs(tmp_path / "a", tmp_path / "b")


def test_a_comparison_has_a_row_a_prompt_and_no_accuracy_for_the_blank_one(tmp_path, classifier):
    model, _ = classifier
    cases = [Case("Cezanne", 0, 0), Case("VanGogh", 0, 1), Case("", 0, 2)]
    for folder, shades in (("before", ("red", "blue", "gray")), ("after", ("gray", "blue", "gray"))):
        (tmp_path / folder).mkdir()
        write_cases(tmp_path / folder / "prompts.csv", cases)
        for case, shade in zip(cases, shades):
            Image.new("RGB", (32, 32), shade).save(tmp_path / folder / f"{case.number}_0.png")
    table = compare(tmp_path / "before", tmp_path / "after", tmp_path / "after" / "prompts.csv", "style", model, CPU)
    assert table.prompt.tolist() == ["Cezanne", "VanGogh", ""]
    assert table.accuracy_before.tolist()[:2] == [100, 100] and table.accuracy_after.tolist()[:2] == [0, 100]
    assert table.accuracy_after.isna()[2] and table.largest_pixel[1] == 0 and table.lpips[0] > 0
    assert {k: len(v) for k, v in by_concept(tmp_path / "after", "style").items()} == {0: 1, 1: 1}
    assert accuracy_table(model, tmp_path / "after", "style").accuracy.tolist() == [0, 100]
    (tmp_path / "after" / "5").mkdir()  # a class folder of another category: the prompt still says what it shows
    (tmp_path / "after" / "1_0.png").rename(tmp_path / "after" / "5" / "1_0.png")
    assert list(by_concept(tmp_path / "after", "style")) == [0, 1]
    with pytest.raises(ValueError, match="concept of category object"):
        by_concept(tmp_path / "after", "object")
    (tmp_path / "after" / "prompts.csv").unlink()
    assert list(by_concept(tmp_path / "after", "style")) == [5]
