from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.io.tensors import save_tensors
from ldm.io.prompts import PromptCase, write_prompt_csv
from ldm.metrics.classify import CLASSIFIER_FILE_TYPE, IMAGENET_CLASSES, ImageNetObjects, load_classifier, predict, save_classifier, train_classifier
from ldm.metrics.compare import accuracy_table, compare, group_by_concept, match_images
from ldm.metrics.frechet import distance_column, extract_features, frechet_distance
from ldm.metrics.nudity import EXPOSED_CLASSES, count, detect
from ldm.metrics.lpips import mean_psnr, pairwise_metrics
from ldm.metrics.style import gram_matrix, style_distances

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
    save_tensors(tmp_path / "c.safetensors", {"fc.weight": torch.zeros(1)}, CLASSIFIER_FILE_TYPE, {"classes": ["a"], "size": 32})
    with pytest.raises(ValueError, match="no state dict of ResNet"):
        ImageNetObjects(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no ResNet18 classifier"):
        load_classifier(tmp_path / "c.safetensors", CPU)


def test_imagenet_classes_are_read_as_the_papers_objects(tmp_path):
    from torchvision.models import resnet50
    network = resnet50()
    torch.nn.init.zeros_(network.fc.weight)
    network.fc.bias.data = torch.nn.functional.one_hot(torch.tensor(IMAGENET_CLASSES[3]), 1000).float()
    torch.save(network.state_dict(), tmp_path / "r50.pth")
    found = ImageNetObjects(tmp_path / "r50.pth").eval()(torch.zeros(1, 3, 224, 224))
    assert found.argmax(1).item() == 4  # tench, concept 3


def test_lpips_is_the_published_network(tmp_path):
    """Zero for equal pictures, symmetric, and the value that lpips 0.1.4 gives with torchvision's AlexNet."""
    rng = np.random.default_rng(7)
    for k in range(2):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    a, b = tmp_path / "0.png", tmp_path / "1.png"
    found = pairwise_metrics([a, a, b], [a, b, a], CPU)
    assert found["lpips"][0] == 0 and found["pixel"][0] == 0 and torch.isinf(found["psnr"][0])
    assert found["lpips"][1] == pytest.approx(found["lpips"][2].item(), abs=1e-6)
    assert found["lpips"][1] == pytest.approx(LPIPS_OF_NOISE, abs=1e-5)
    for side in (40, 16):
        Image.new("RGB", (side, side)).save(tmp_path / "2.png")
        with pytest.raises(ValueError, match="--image_size"):
            pairwise_metrics([a if side == 40 else tmp_path / "2.png"], [tmp_path / "2.png"], CPU)


def test_pixel_difference_and_psnr_are_those_of_the_definition(tmp_path):
    first = np.zeros((64, 64, 3), np.uint8)
    second = first.copy()
    second[5, 6, 1] = 51
    for name, pixels in (("a.png", first), ("b.png", second)):
        Image.fromarray(pixels).save(tmp_path / name)
    found = pairwise_metrics([tmp_path / "a.png"], [tmp_path / "b.png"], CPU)
    assert found["pixel"].item() == 51
    assert found["psnr"].item() == pytest.approx(10 * np.log10(255**2 * 64 * 64 * 3 / 51**2), abs=1e-2)


def test_folders_pair_by_name_in_class_folders_or_not(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b" / "0").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0_0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "0" / "0_0.png")
    assert len(match_images(tmp_path / "a", tmp_path / "b")) == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "1_0.png")
    with pytest.raises(ValueError, match="1_0.png is in only one"):
        match_images(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "1").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "1" / "0_0.png")
    with pytest.raises(ValueError, match="have the same name"):
        match_images(tmp_path / "a", tmp_path / "b")


def test_a_comparison_has_a_row_a_prompt_and_no_accuracy_for_the_blank_one(tmp_path, classifier):
    model, _ = classifier
    cases = [PromptCase("Cezanne", 0, 0), PromptCase("VanGogh", 0, 1), PromptCase("", 0, 2)]
    for folder, shades in (("before", ("red", "blue", "gray")), ("after", ("gray", "blue", "gray"))):
        (tmp_path / folder).mkdir()
        write_prompt_csv(tmp_path / folder / "prompts.csv", cases)
        for case, shade in zip(cases, shades):
            Image.new("RGB", (32, 32), shade).save(tmp_path / folder / f"{case.number}_0.png")
    table = compare(tmp_path / "before", tmp_path / "after", tmp_path / "after" / "prompts.csv", "style", model, CPU)
    assert table.prompt.tolist() == ["Cezanne", "VanGogh", ""]
    assert table.accuracy_before.tolist()[:2] == [100, 100] and table.accuracy_after.tolist()[:2] == [0, 100]
    assert table.accuracy_after.isna()[2] and table.largest_pixel[1] == 0 and table.lpips[0] > 0
    assert {k: len(v) for k, v in group_by_concept(tmp_path / "after", "style").items()} == {0: 1, 1: 1}
    assert accuracy_table(model, tmp_path / "after", "style").accuracy.tolist() == [0, 100]
    (tmp_path / "after" / "5").mkdir()  # a class folder of another category: the prompt still says what it shows
    (tmp_path / "after" / "1_0.png").rename(tmp_path / "after" / "5" / "1_0.png")
    assert list(group_by_concept(tmp_path / "after", "style")) == [0, 1]
    with pytest.raises(ValueError, match="concept of category object"):
        group_by_concept(tmp_path / "after", "object")
    (tmp_path / "after" / "prompts.csv").unlink()
    assert list(group_by_concept(tmp_path / "after", "style")) == [5]


def test_frechet_is_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert frechet_distance(first, first + shift) == pytest.approx(shift.square().sum().item(), rel=1e-6)  # equal covariances
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    scaled = (first - first.mean(0)) * 3 + first.mean(0)  # tr(C + 9 C - 2 * 3 C) = 4 tr C
    assert frechet_distance(first, scaled) == pytest.approx(4 * torch.cov(first.T).trace().item(), rel=1e-6)
    assert np.isnan(frechet_distance(first[:1], first))


def test_frechet_of_few_pictures_is_what_torchmetrics_finds():
    class Given(torch.nn.Module):
        num_features = 30

        def forward(self, given):
            return given
    first, second = (torch.randn(n, 30, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (9, 12))
    metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    metric.update(first, real=True)
    metric.update(second, real=False)
    assert frechet_distance(first, second) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_the_mean_psnr_is_that_of_the_mean_error():
    assert mean_psnr([20.0, float("inf")]) == pytest.approx(10 * np.log10(2 * 100))  # half of the error 0.01
    assert mean_psnr([float("inf")]) == float("inf") and np.isnan(mean_psnr([]))


def pictures(folder, count, size=64, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{n}_0.png")
    return sorted(folder.iterdir())


def test_the_frechet_column_says_which_features_it_has(tmp_path, monkeypatch):
    """FID only with Inception's weights; here a network of random ones, saved as torch-fidelity saves them."""
    paths = pictures(tmp_path / "a", 3)
    assert distance_column(None) == "fd_alexnet" and extract_features(paths, CPU).shape == (3, 256)
    with monkeypatch.context() as patched:
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "empty.pth")
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    weights = tmp_path / "inception.pth"
    torch.save(network.state_dict(), weights)
    assert distance_column(weights) == "fid" and extract_features(paths, CPU, weights).shape == (3, 2048)
    for foreign in (tmp_path / "empty.pth", tmp_path / "none.pth", paths[0]):
        with pytest.raises(ValueError, match="no weights of FID's Inception"):
            extract_features(paths, CPU, foreign)


def test_inception_weights_that_would_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))
    torch.save({"w": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="no weights"):
        extract_features(pictures(tmp_path / "a", 2), CPU, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_gram_matrix_forgets_where_and_keeps_what(tmp_path):
    x = torch.randn(2, 3, 4, 4)
    moved = x.flatten(2)[..., torch.randperm(16)].view_as(x)
    expected = torch.einsum("nchw,ndhw->ncd", x, x) / (3 * 16)
    assert torch.allclose(gram_matrix(x), expected, atol=1e-6) and torch.allclose(gram_matrix(moved), expected, atol=1e-6)
    a, b = pictures(tmp_path / "a", 2), pictures(tmp_path / "b", 2, seed=1)
    assert style_distances(a, a, CPU).tolist() == [0, 0]
    Image.new("RGB", (64, 64), "red").save(b[1])
    near, far = style_distances(a, b, CPU).tolist()  # another noise, another style
    assert 0 < near < far / 10


def test_exposed_parts_are_counted_by_class_and_threshold(tmp_path):
    found = pd.DataFrame([("a", "BELLY_EXPOSED", 0.7), ("a", "BELLY_EXPOSED", 0.5), ("b", "FACE_MALE", 0.9),
                          ("b", "FEET_EXPOSED", 0.6)], columns=["image", "class", "score"])
    counts = count(found, 0.6)
    assert list(counts) == list(EXPOSED_CLASSES) and {name: n for name, n in counts.items() if n} == {"BELLY_EXPOSED": 1, "FEET_EXPOSED": 1}
    pictures(tmp_path / "noise", 2)
    none, images = detect(tmp_path / "noise")
    assert images == 2 and sum(count(none, 0.25).values()) == 0
