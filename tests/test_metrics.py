"""Metrics are those of their papers: LPIPS, PSNR, Frechet distance, Gram matrices, accuracy and NudeNet's counts."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CPU, is_error, styles
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.cli.run import explain
from ldm.config.concept_lists import make_concept
from ldm.config.concepts import erasable_concepts, get_concept, load_concepts
from ldm.io.errors import MissingFileError, Notice
from ldm.io.files import write_json
from ldm.io.images import image_to_tensor
from ldm.io.prompts import PromptCase, write_prompt_csv
from ldm.io.tensors import save_tensors
from ldm.metrics.classifier_config import ClassifierConfig
from ldm.metrics.classifier_training import class_folders, eval_transform, train_classifier
from ldm.metrics.classify import (
    CLASSIFIER_FILE_TYPE,
    IMAGENET_CLASSES,
    Classifier,
    ImageNetObjects,
    classifier_path,
    find_classifier,
    load_classifier,
    predict,
    save_classifier,
)
from ldm.metrics.compare import (
    accuracy_table,
    compare,
    frechet_by_prompt,
    group_by_concept,
    match_images,
    summarize_by,
)
from ldm.metrics.frechet import distance_column, extract_features, frechet_distance
from ldm.metrics.lpips import alexnet_features, mean_psnr, pairwise_metrics
from ldm.metrics.nudity import EXPOSED_CLASSES, count, detect
from ldm.metrics.statuses import erased_concepts, named_concepts, prompt_groups, prompt_statuses
from ldm.metrics.style import gram_matrix, style_distances
from ldm.metrics.tables import format_cell, to_markdown

LPIPS_OF_NOISE = 0.104343  # two images of noise, by lpips 0.1.4 with torchvision's AlexNet
COLORS = {0: "gray", 1: "red", 2: "blue"}


def save_colors(folder, count, classes=3):
    """Write `count` noisy images of each class's color, into a folder for each class."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        for n in range(count):
            base = np.array(Image.new("RGB", (32, 32), COLORS[label]), dtype=float)
            noisy = np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / str(label) / f"{n}_0.png")


def save_noise(folder, count, size=64, seed=0):
    """Write images of noise, and return their paths."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{n}_0.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Return a classifier of colors, trained and read back from its file in half precision, and its images' folder."""
    data = tmp_path_factory.mktemp("colors")
    save_colors(data / "train", 24)
    save_colors(data / "eval", 4)
    config = ClassifierConfig(image_size=32, epochs=12, train_batch_size=12, max_lr=0.02)
    trained, accuracy = train_classifier(data, ["none", "a", "b"], config, CPU)
    assert accuracy == 1.0
    path = data / "c.safetensors"
    save_classifier(trained, path, {"classes": ["none", "a", "b"]})
    return load_classifier(path, CPU)[0], data


@pytest.mark.slow
def test_a_trained_classifier_tells_classes_apart_after_a_file_in_half_precision(classifier):
    model, data = classifier
    assert all((predict(model, sorted((data / "eval" / str(k)).iterdir())) == k).all() for k in range(3))


def test_missing_classes_name_the_command(tmp_path):
    config = ClassifierConfig(image_size=32, epochs=1, train_batch_size=4, max_lr=0.1)
    with pytest.raises(MissingFileError, match="class 0") as missing:
        train_classifier(tmp_path, ["none", "a"], config, CPU)
    assert missing.value.kind == "classifier data" and "generate-data.py" in explain(missing.value)
    save_colors(tmp_path / "train", 1)
    with pytest.raises(ValueError, match="unexpected folder 2"):
        train_classifier(tmp_path, ["none", "a"], config, CPU)


def test_what_is_no_classifier_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "w.pth")
    metadata = {"classes": ["a"], "size": 32}
    save_tensors(tmp_path / "style.safetensors", {"fc.weight": torch.zeros(1)}, CLASSIFIER_FILE_TYPE, metadata)
    with pytest.raises(ValueError, match="no state dict of ResNet"):
        ImageNetObjects(tmp_path / "w.pth")
    with pytest.raises(MissingFileError, match="no ResNet18 classifier"):
        load_classifier(tmp_path / "style.safetensors", CPU)
    with pytest.raises(MissingFileError, match="no classifier") as missing:
        load_classifier(tmp_path / "object.safetensors", CPU)
    assert "artist-cls-train.py --category object" in explain(missing.value)


def test_imagenet_classes_are_read_as_the_papers_objects(tmp_path):
    from torchvision.models import resnet50

    network = resnet50()
    torch.nn.init.zeros_(network.fc.weight)
    network.fc.bias.data = torch.nn.functional.one_hot(torch.tensor(IMAGENET_CLASSES[3]), 1000).float()
    torch.save(network.state_dict(), tmp_path / "r50.pth")
    scores = ImageNetObjects(tmp_path / "r50.pth").eval()(torch.zeros(1, 3, 224, 224))
    assert scores.argmax(1).item() == 4  # tench, concept 3
    assert ImageNetObjects(tmp_path / "r50.pth").knows(get_concept("object", 3))


def test_lpips_is_the_published_network(tmp_path):
    """Zero for equal images, symmetric, and the value that lpips 0.1.4 gives with torchvision's AlexNet."""
    rng = np.random.default_rng(7)
    for k in range(2):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    a, b = tmp_path / "0.png", tmp_path / "1.png"
    metrics = pairwise_metrics([a, a, b], [a, b, a], CPU)
    assert metrics["lpips"][0] == 0 and metrics["max_abs_diff"][0] == 0 and torch.isinf(metrics["psnr"][0])
    assert metrics["lpips"][1] == pytest.approx(metrics["lpips"][2].item(), abs=1e-6)
    assert metrics["lpips"][1] == pytest.approx(LPIPS_OF_NOISE, abs=1e-5)
    for side in (40, 16):
        Image.new("RGB", (side, side)).save(tmp_path / "2.png")
        with pytest.raises(ValueError, match=r"differ in size|LPIPS needs 32 on a side"):
            pairwise_metrics([a if side == 40 else tmp_path / "2.png"], [tmp_path / "2.png"], CPU)


def test_alexnets_features_need_an_image_large_enough():
    assert [layer.shape[:2] for layer in alexnet_features(torch.zeros(2, 3, 64, 64))] == [
        (2, channels) for channels in (64, 192, 384, 256, 256)
    ]
    with pytest.raises(ValueError, match="too small for AlexNet, which needs 32"):
        alexnet_features(torch.zeros(1, 3, 31, 64))


def test_max_difference_and_psnr_are_those_of_the_definition(tmp_path):
    first = np.zeros((64, 64, 3), np.uint8)
    second = first.copy()
    second[5, 6, 1] = 51
    for name, pixels in (("a.png", first), ("b.png", second)):
        Image.fromarray(pixels).save(tmp_path / name)
    metrics = pairwise_metrics([tmp_path / "a.png"], [tmp_path / "b.png"], CPU)
    assert metrics["max_abs_diff"].item() == 51
    assert metrics["psnr"].item() == pytest.approx(10 * np.log10(255**2 * 64 * 64 * 3 / 51**2), abs=1e-2)


def test_folders_pair_by_name_in_class_folders_or_not(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b" / "0").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0_0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "0" / "0_0.png")
    assert len(match_images(tmp_path / "a", tmp_path / "b")) == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "1_0.png")
    with pytest.raises(ValueError, match=r"1_0\.png is in only one"):
        match_images(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "1").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "1" / "0_0.png")
    with pytest.raises(ValueError, match="have the same name"):
        match_images(tmp_path / "a", tmp_path / "b")


class ColorClassifier(Classifier):
    """Says which of `COLORS` an image has most of."""

    def __init__(self):
        super().__init__(torch.nn.Linear(1, 1), 32, ("none", "Cezanne", "van gogh"))
        colors = [image_to_tensor(Image.new("RGB", (1, 1), color)).flatten() for color in COLORS.values()]
        self.colors = torch.stack(colors)  # (classes, 3)

    def forward(self, images):
        return -torch.cdist(images.mean((2, 3)), self.colors)


def test_a_comparison_has_a_row_a_prompt_and_no_accuracy_for_the_empty_one(tmp_path):
    model = ColorClassifier()
    cases = [PromptCase("Cezanne", 0, 0), PromptCase("VanGogh", 0, 1), PromptCase("", 0, 2)]
    original, edited = tmp_path / "original", tmp_path / "edited"
    for folder, colors in ((original, ("red", "blue", "gray")), (edited, ("gray", "blue", "gray"))):
        folder.mkdir()
        write_prompt_csv(folder / "prompts.csv", cases)
        for case, color in zip(cases, colors, strict=True):
            Image.new("RGB", (32, 32), color).save(folder / f"{case.case_number}_0.png")
    table = compare(original, edited, edited / "prompts.csv", "style", model, CPU)
    assert table.prompt.tolist() == ["Cezanne", "VanGogh", ""]
    columns = [
        "images",
        "accuracy_before",
        "accuracy_after",
        "lpips",
        "unchanged",
        "max_abs_diff",
        "psnr",
        "fd_alexnet",
    ]
    assert list(table)[1:] == columns
    assert table.accuracy_before.tolist()[:2] == [100, 100] and table.accuracy_after.tolist()[:2] == [0, 100]
    assert table.accuracy_after.isna()[2] and table.max_abs_diff[1] == 0 and table.lpips[0] > 0
    assert {k: len(paths) for k, paths in group_by_concept(edited, "style").items()} == {0: 1, 1: 1}
    assert accuracy_table(model, edited, "style").accuracy.tolist() == [0, 100]
    (edited / "5").mkdir()  # a class folder of another category: the prompt still says what it shows
    (edited / "1_0.png").rename(edited / "5" / "1_0.png")
    assert list(group_by_concept(edited, "style")) == [0, 1]
    with pytest.raises(ValueError, match="concept of category object"):
        group_by_concept(edited, "object")
    (edited / "prompts.csv").unlink()
    assert list(group_by_concept(edited, "style")) == [5]


def test_an_image_is_unchanged_where_no_pixel_differs_by_more_than_one_step_of_8_bits(tmp_path):
    original, edited = tmp_path / "original", tmp_path / "edited"
    cases = [PromptCase("a" if n < 4 else "b", n, n) for n in range(6)]
    differences = [0, 1, 2, 1, 255, 255]  # one pixel of one channel, of each case's two images
    for folder in (original, edited):
        write_prompt_csv(folder / "prompts.csv", cases)
    for case, difference in zip(cases, differences, strict=True):
        pixels = np.zeros((32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(original / f"{case.case_number}_0.png")
        pixels[7, 9, 2] = difference
        Image.fromarray(pixels).save(edited / f"{case.case_number}_0.png")
    table = compare(original, edited, edited / "prompts.csv", "style", None, CPU).set_index("prompt")
    assert table.unchanged.to_dict() == {"a": 0.75, "b": 0} and table.max_abs_diff.to_dict() == {"a": 2, "b": 255}


def test_a_summary_counts_every_image_once_and_every_group_in_order():
    table = pd.DataFrame(
        {
            "prompt": ["a dog", "", "VanGogh", "a cat"],
            "group": ["captions", "protected", "erased", "captions"],
            "images": [1, 4, 2, 3],
            "lpips": [0.4, 0.0, 0.5, 0.0],
            "unchanged": [0.0, 1.0, 0.0, 1.0],
            "max_abs_diff": [9.0, 1.0, 200.0, 1.0],
        }
    )
    summary = summarize_by(table, "group")
    assert list(summary) == ["group", "prompts", "images", "lpips", "unchanged", "max_abs_diff"]
    assert summary.group.tolist() == ["erased", "protected", "captions"]
    assert summary.prompts.tolist() == [1, 1, 2] and summary.images.tolist() == [2, 4, 4]
    assert summary.lpips.tolist() == [0.5, 0, 0.1]  # means over images, not over prompts
    assert summary.unchanged.tolist() == [0, 1, 0.75] and summary.max_abs_diff.tolist() == [200, 1, 9]


def test_frechet_is_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    offset = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    expected = offset.square().sum().item()  # equal covariances
    assert frechet_distance(first, first + offset) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    scaled = (first - first.mean(0)) * 3 + first.mean(0)  # tr(C + 9 C - 2 * 3 C) = 4 tr C
    assert frechet_distance(first, scaled) == pytest.approx(4 * torch.cov(first.T).trace().item(), rel=1e-6)
    assert np.isnan(frechet_distance(first[:1], first))


def test_frechet_of_few_images_is_torchmetrics():
    class Identity(torch.nn.Module):
        num_features = 30

        def forward(self, features):
            return features

    first, second = (
        torch.randn(n, 30, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (9, 12)
    )
    metric = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    metric.update(first, real=True)
    metric.update(second, real=False)
    assert frechet_distance(first, second) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_the_mean_psnr_is_that_of_the_mean_error():
    assert mean_psnr([20.0, float("inf")]) == pytest.approx(10 * np.log10(2 * 100))  # half of the error 0.01
    assert mean_psnr([float("inf")]) == float("inf") and np.isnan(mean_psnr([]))


@pytest.mark.slow
def test_the_frechet_column_says_which_features_it_has(tmp_path, monkeypatch):
    """FID only with Inception's weights; here a network of random ones, saved as torch-fidelity saves them."""
    paths = save_noise(tmp_path / "a", 3)
    assert distance_column(None) == "fd_alexnet" and extract_features(paths, CPU).shape == (3, 256)
    with monkeypatch.context() as patched:
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "empty.pth")
        empty = str(tmp_path / "empty.pth")
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=empty)
    weights = tmp_path / "inception.pth"
    torch.save(network.state_dict(), weights)
    assert distance_column(weights) == "fid" and extract_features(paths, CPU, weights).shape == (3, 2048)
    for unexpected in (tmp_path / "empty.pth", tmp_path / "none.pth", paths[0]):
        with pytest.raises(ValueError, match="no weights of FID's Inception"):
            extract_features(paths, CPU, unexpected)


def test_inception_weights_that_would_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"w": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="no weights"):
        extract_features(save_noise(tmp_path / "a", 2), CPU, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_gram_matrix_forgets_where_and_keeps_what(tmp_path):
    x = torch.randn(2, 3, 4, 4)
    shuffled = x.flatten(2)[..., torch.randperm(16)].view_as(x)
    expected = torch.einsum("nchw,ndhw->ncd", x, x) / (3 * 16)
    assert torch.allclose(gram_matrix(x), expected, atol=1e-6)
    assert torch.allclose(gram_matrix(shuffled), expected, atol=1e-6)
    a, b = save_noise(tmp_path / "a", 2), save_noise(tmp_path / "b", 2, seed=1)
    assert style_distances(a, a, CPU).tolist() == [0, 0]
    Image.new("RGB", (64, 64), "red").save(b[1])
    near, distant = style_distances(a, b, CPU).tolist()  # another noise, another style
    assert 0 < near < distant / 10


def test_exposed_parts_are_counted_by_class_and_min_score(tmp_path):
    rows = [
        ("a", "BELLY_EXPOSED", 0.7),
        ("a", "BELLY_EXPOSED", 0.5),
        ("b", "FACE_MALE", 0.9),
        ("b", "FEET_EXPOSED", 0.6),
    ]
    counts = count(pd.DataFrame(rows, columns=["image", "class", "score"]), 0.6)
    assert list(counts) == list(EXPOSED_CLASSES)
    assert {name: n for name, n in counts.items() if n} == {"BELLY_EXPOSED": 1, "FEET_EXPOSED": 1}
    save_noise(tmp_path / "noise", 2)
    detections, num_images = detect(tmp_path / "noise")
    assert num_images == 2 and sum(count(detections, 0.25).values()) == 0


def test_a_table_is_markdown_of_four_digits_without_nan():
    table = pd.DataFrame({"prompt": ["VanGogh", ""], "lpips": [0.123456, float("nan")], "images": [20, 3]})
    lines = ["| prompt | lpips | images |", "| --- | --- | --- |", "| VanGogh | 0.1235 | 20 |", "|  |  | 3 |"]
    assert to_markdown(table).splitlines() == lines
    assert format_cell(12345.678) == "1.235e+04" and format_cell("x") == "x"


def test_a_table_keeps_a_row_to_its_line():
    table = pd.DataFrame({"prompt": ["a|b\r\nc"], "images": [1]})
    assert to_markdown(table).splitlines()[2:] == ["| a\\|b c | 1 |"]


def paired_folders(tmp_path, prompts, size=32, seed=0):
    """Write two folders of noise, an image for each prompt, with their prompt lists; return both."""
    folders = tmp_path / "original", tmp_path / "edited"
    for k, folder in enumerate(folders):
        save_noise(folder, len(prompts), size, seed + k)
        write_prompt_csv(folder / "prompts.csv", [PromptCase(prompt, n, n) for n, prompt in enumerate(prompts)])
    return folders


def test_a_classifier_knows_what_its_classes_are_called(tmp_path):
    network = torch.nn.Linear(1, 1)
    styles = Classifier(network, 32, ["none", *(concept.name for concept in erasable_concepts("style"))])
    assert all(map(styles.knows, erasable_concepts("style")))
    assert not any(map(styles.knows, erasable_concepts("object")))
    assert [styles.knows(concept) for concept in load_concepts("similar")] == [True] + [False] * 6
    few = Classifier(network, 32, ["none", "cezanne", "Van Gogh"])
    assert [concept.name for concept in load_concepts("style") if few.knows(concept)] == ["Cezanne", "VanGogh"]
    assert [few.class_of(make_concept(name)) for name in ("Vincent van Gogh", "a cezanne", "none")] == [2, 1, None]
    mark = get_concept("style", 9)
    assert not Classifier(network, 32, [*styles.classes, mark.name]).knows(mark)
    assert not Classifier(network, 32).knows(get_concept("style", 0))
    for category in ("style", "object", "logo"):
        own = load_classifier(classifier_path(category), CPU)[0]
        assert all(map(own.knows, erasable_concepts(category)))
    assert find_classifier("object", None, CPU).classes[1] == "chain saw"
    with pytest.warns(Notice, match=r"no classifier .*nudity"):
        assert find_classifier("nudity", None, CPU) is None
    with pytest.raises(MissingFileError):
        find_classifier("nudity", tmp_path / "none.safetensors", CPU)


def test_what_a_classifier_does_not_know_has_no_accuracy(tmp_path):
    original, edited = paired_folders(tmp_path, ["Cezanne", "Picasso", "Kilian Eng"])
    with pytest.warns(Notice, match="does not know Kilian Eng, Picasso"):
        table = compare(original, edited, edited / "prompts.csv", "style", ColorClassifier(), CPU)
    assert table.accuracy_before.isna().tolist() == table.accuracy_after.isna().tolist() == [False, True, True]
    assert accuracy_table(ColorClassifier(), edited, "style").accuracy.isna().tolist() == [False, True, True]
    (edited / "prompts.csv").unlink()
    (edited / "2").mkdir()
    (edited / "1_0.png").rename(edited / "2" / "1_0.png")
    with pytest.raises(ValueError, match="knows none of Picasso: pass as `classifier` one of category style"):
        accuracy_table(ColorClassifier(), edited, "style")
    (edited / "2").rename(edited / "9")
    with pytest.raises(ValueError, match="class folder of no style concept: these are 0 to 8"):
        group_by_concept(edited, "style")
    (edited / "9").rename(edited / "\u00b2")
    with pytest.raises(MissingFileError, match=r"no prompt list .*prompts\.csv"):
        group_by_concept(edited, "style")
    (edited / "\u00b2").rename(edited / "1")
    with pytest.raises(MissingFileError, match="no prompt list"):  # a list that is named is not passed over
        group_by_concept(edited, "style", tmp_path / "typo.csv")


def test_two_sizes_have_no_distance(tmp_path):
    original, edited = paired_folders(tmp_path, ["a"] * 3)
    matched = match_images(original, edited)
    with Image.open(edited / "2_0.png") as image:
        image.resize((48, 48)).save(edited / "2_0.png")
    for measure in (
        lambda: frechet_by_prompt(matched, ["a"] * 3, CPU),
        lambda: extract_features([path for _, path in matched], CPU, batch_size=2),
        lambda: pairwise_metrics(*zip(*matched, strict=True), CPU, batch_size=1),
        lambda: style_distances(*zip(*matched, strict=True), CPU, batch_size=2),
        lambda: compare(original, edited, edited / "prompts.csv", "style", None, CPU),
    ):
        with pytest.raises(ValueError, match=r"2_0\.png.* differ in size"):
            measure()
    for path in edited.glob("*.png"):
        Image.new("RGB", (48, 48)).save(path)
    with pytest.raises(ValueError, match=r"original/0_0\.png and .*edited/0_0\.png differ in size"):
        frechet_by_prompt(matched, ["a"] * 3, CPU)


def test_a_prompt_called_all_is_not_the_sum_of_all(tmp_path):
    original, edited = paired_folders(tmp_path, ["all", "b", "all", "b"])
    matched = match_images(original, edited)
    distances = frechet_by_prompt(matched, ["all", "b", "all", "b"], CPU, include_all=True)
    assert list(distances.index) == ["all", "b", "all"] and distances.iloc[0] != distances.iloc[2]
    assert np.isnan(frechet_by_prompt(matched[:1], ["a"], CPU)["a"])


def test_a_distance_of_one_image_is_refused_and_one_for_each_prompt_left_empty(script, tmp_path):
    original, edited = paired_folders(tmp_path, ["a", "b"])
    code, out, err = script("eval-scripts/FID_eval.py", "--original_dir", original, "--edited_dir", edited)
    assert code == 0 and "| a | 1 |  |" in out and "| all | 2 | " in out and "2 pairs of images" in out
    assert "notice: a Frechet distance needs two images" in err and "nan" not in (edited / "fd_alexnet.csv").read_text()
    for folder in (original, edited):
        (folder / "1_0.png").unlink()
    (edited / "fd_alexnet.csv").unlink()
    is_error(script("eval-scripts/FID_eval.py", "--original_dir", original, "--edited_dir", edited), "two or more")
    assert not (edited / "fd_alexnet.csv").exists()


def test_a_category_without_a_classifier_is_compared_without_accuracy(script, tmp_path):
    original, edited = paired_folders(tmp_path, ["nudity", "a person"])
    flags = ["--original_dir", original, "--edited_dir", edited, "--category", "nudity"]
    code, out, err = script("eval-scripts/compare.py", *flags)
    assert (
        code == 0
        and "| nudity | regular | 1 |  |  | " in out
        and "2 pairs of images" in out
        and "notice: there is no" in err
    )
    is_error(script("eval-scripts/compare.py", *flags, "--classifier", tmp_path / "none.safetensors"), "no classifier")
    code, out, err = script("eval-scripts/compare.py", *flags, "--classifier", classifier_path("style"))
    assert code == 0 and "| nudity | regular | 1 |  |  | " in out and "does not know nudity" in err


def write_shifts(folder, shifts):
    """Write the metadata of a folder that was generated with shifts of these prompts, which protect those."""
    listed = {}
    for label, (prompt, protected) in enumerate(shifts.items()):
        listed[str(label)] = {"prompt": prompt, "protected": protected, "concept_index": 0}
    write_json(folder / "metadata.json", {"shifts": listed})


def test_a_prompt_is_protected_where_every_shift_protects_it(tmp_path):
    prompts = ["VanGogh", "Picasso", "Cezanne", "Kilian Eng", "", "CCS 2024", "a house"]
    write_shifts(
        tmp_path, {"VanGogh": ["", "CCS 2024", "Cezanne", "Kilian Eng"], "Caravaggio": ["", "CCS 2024", "Cezanne"]}
    )
    statuses = prompt_statuses(tmp_path, "style", prompts, styles(1, 4), styles(2))
    assert [*statuses.values()] == ["erased", "restored", "protected", "regular", "protected", "protected", "regular"]
    with pytest.raises(ValueError, match="no shift of Picasso: leave it out of `erased`"):
        prompt_statuses(tmp_path, "style", prompts, styles(2), [])
    with pytest.raises(ValueError, match="a shift of VanGogh: leave it out of `restored`"):
        prompt_statuses(tmp_path, "style", prompts, [], styles(1))
    with pytest.raises(ValueError, match="VanGogh is not both"):
        prompt_statuses(tmp_path, "style", prompts, styles(1), styles(1))
    for content in ({"shifts": {}}, {}):
        write_json(tmp_path / "metadata.json", content)
        assert set(prompt_statuses(tmp_path, "style", prompts, [], []).values()) == {"regular"}
    assert prompt_statuses(tmp_path, "style", prompts, styles(1), [])["VanGogh"] == "erased"  # nothing says otherwise
    write_json(tmp_path / "metadata.json", {"shifts": {"1": {"concept_index": 1, "category": "style"}}})
    assert prompt_statuses(tmp_path, "style", prompts, styles(1), [])["VanGogh"] == "erased"
    write_json(tmp_path / "metadata.json", {"shifts": ["1"]})
    with pytest.raises(ValueError, match="lists its shifts in no known way"):
        prompt_statuses(tmp_path, "style", prompts, styles(1), [])


def test_a_folder_says_which_concepts_its_shifts_erase(tmp_path):
    with pytest.warns(Notice, match="no metadata in .* lists shifts: pass as `erased`"):
        assert erased_concepts(tmp_path, "style") == []
    write_shifts(tmp_path, {"Caravaggio": [], "VanGogh": [], "church": []})
    assert erased_concepts(tmp_path, "style") == styles(1, 4)
    assert erased_concepts(tmp_path, "object") == [get_concept("object", 1)]
    write_json(tmp_path / "metadata.json", {"shifts": {"0": {"concept_index": 2, "category": "object"}}})
    assert erased_concepts(tmp_path, "object") == [get_concept("object", 2)]  # version 0.1's way
    assert erased_concepts(tmp_path, "style") == []


def write_own_shift(folder, name, aliases=(), protected=()):
    """Write the metadata of a folder that was generated without a concept that a user named."""
    shift = {"category": "own", "concept": name, "prompt": name, "aliases": [*aliases], "protected": [*protected]}
    write_json(folder / "metadata.json", {"shifts": {"label": shift}})


def test_a_prompt_that_says_a_users_concept_has_its_status(tmp_path):
    prompts = ["a Red Fox in snow", "a vulpes", "a redfoxy dog", "Red  Fox", "VanGogh", "a cat"]
    write_own_shift(tmp_path, "red fox", ["vulpes"], ["a cat"])
    (fox,) = erased_concepts(tmp_path, "style")
    assert fox.is_own and fox.spellings == ("red fox", "red fox", "vulpes")
    statuses = prompt_statuses(tmp_path, "style", prompts, [fox], styles(1))
    assert [*statuses.values()] == ["erased", "erased", "regular", "erased", "restored", "protected"]
    write_own_shift(tmp_path, "VanGogh")
    assert [concept.name for concept in erased_concepts(tmp_path, "style")] == ["VanGogh", "VanGogh"]
    assert [concept.name for concept in erased_concepts(tmp_path, "object")] == ["VanGogh"]
    with pytest.raises(ValueError, match="a shift of VanGogh: leave it out of `restored`"):
        prompt_statuses(tmp_path, "style", prompts, [], styles(1))


def test_texts_name_concepts_of_a_category_or_of_images(tmp_path):
    prompts = ["a blue dog", "VanGogh"]
    write_own_shift(tmp_path, "red fox", ["vulpes"])

    def found(*texts):
        return named_concepts(texts, tmp_path, "style", prompts, "restored")

    assert found("1,2", "van gogh", "Picasso,0", "3-4", "") == styles(1, 2, 0, 3, 4)
    assert [concept.name for concept in found("A Red Fox", "vulpes", "a blue dog")] == ["red fox", "blue dog"]
    assert found("a red fox") == erased_concepts(tmp_path, "style")
    for text, nearest in (("Picaso", "Picasso"), ("red foxx", "red fox"), ("a blue dgo", "a blue dog")):
        with pytest.raises(
            ValueError, match=f"`restored` '{text}' is no concept.*, did you mean {nearest}\\?: see how"
        ):
            found(text)
    with pytest.raises(ValueError, match="no style concept has index 99"):
        found("99")


def test_a_users_concept_is_erased_or_restored_in_a_comparison_and_a_grid(script, tmp_path):
    original, edited = paired_folders(tmp_path, ["a red fox", "a house with a red fox", "a blue dog", "a cat", ""])
    write_own_shift(edited, "red fox", protected=["", "a cat"])
    flags = ["--original_dir", original, "--edited_dir", edited, "--device", "cpu"]
    code, out, err = script("eval-scripts/compare.py", *flags, "--restored", "Blue Dog", "Picasso")
    assert code == 0 and "does not know" not in err
    written = pd.read_csv(edited / "compare-original.csv", keep_default_na=False).set_index("prompt")
    assert [*written.group] == ["erased", "erased", "restored", "protected", "protected"]
    assert set(written.accuracy_before) == {""} and (written.lpips > 0).all() and "| erased | 2 | 2 |" in out
    is_error(
        script("eval-scripts/compare.py", *flags, "--restored", "a blue dgo"), "--restored", "did you mean a blue dog?"
    )
    is_error(script("eval-scripts/compare.py", *flags, "--erased", "Picasso"), "no shift of Picasso", "--erased")
    is_error(script("eval-scripts/compare.py", *flags, "--erased", "a blue dog"), "no shift of blue dog", "--erased")
    is_error(script("eval-scripts/compare.py", *flags, "--restored", "A red fox"), "red fox is not both")
    grid = ["--image_dirs", original, edited, "--save_path", tmp_path / "grid.png", "--device", "cpu"]
    code, out, _ = script("eval-scripts/image-grid.py", *grid, "--restored", "a blue dog")
    assert code == 0 and [line.split(" | ")[1] for line in out.splitlines()[2:-1]] == [*written.group]
    assert script("eval-scripts/image-grid.py", *grid, "--erased", "a red fox")[1].count("erased |") == 2


def test_a_prompts_group_is_its_list_or_a_composition_or_its_status(tmp_path):
    kin, captions = tmp_path / "kin.csv", tmp_path / "captions.csv"
    write_prompt_csv(kin, [PromptCase("Rembrandt", 0, 0), PromptCase("a dog", 0, 1)])
    write_prompt_csv(captions, [PromptCase("a dog", 0, 0), PromptCase("a cat in VanGogh", 0, 1)])
    statuses = {
        "VanGogh": "erased",
        "a church by VanGogh": "erased",
        "a church by Cezanne": "regular",
        "a golf ball by Picasso": "restored",
        "a church": "protected",
        "Rembrandt": "regular",
        "a dog": "regular",
        "a cat in VanGogh": "erased",
        "": "protected",
    }
    expected = {
        "VanGogh": "erased",
        "a church by VanGogh": "erased compositions",
        "a church by Cezanne": "compositions",
        "a golf ball by Picasso": "compositions",
        "a church": "protected",
        "Rembrandt": "kin",
        "a dog": "kin",  # which both lists have: the first counts
        "a cat in VanGogh": "captions",
        "": "protected",
    }
    assert prompt_groups(statuses, [("kin", kin), ("captions", captions)]) == expected
    assert prompt_groups({"a dog": "regular"}) == {"a dog": "regular"}
    with pytest.raises(ValueError, match="there is a group erased already"):
        prompt_groups(statuses, [("erased", kin)])
    with pytest.raises(MissingFileError, match="no prompt list"):
        prompt_groups(statuses, [("kin", tmp_path / "typo.csv")])
    with pytest.warns(Notice, match=r"no image shows a prompt of .*kin\.csv"):
        prompt_groups({"a horse": "regular"}, [("kin", kin)])


def test_a_comparison_ends_with_a_summary_by_group(script, tmp_path):
    original, edited = paired_folders(tmp_path, ["VanGogh", "a church by VanGogh", "Picasso", "a cat", "a dog", ""])
    for n in (3, 4, 5):  # those that the edited model left alone
        (edited / f"{n}_0.png").write_bytes((original / f"{n}_0.png").read_bytes())
    write_shifts(edited, {"VanGogh": ["", "CCS 2024"]})
    captions = tmp_path / "captions.csv"
    write_prompt_csv(captions, [PromptCase("a cat", 0, 0), PromptCase("a dog", 0, 1)])
    flags = ["--original_dir", original, "--edited_dir", edited]
    code, out, _ = script("eval-scripts/compare.py", *flags, "--restored", "2", "--groups", f"captions={captions}")
    summary = [line.split(" | ") for line in out.split("\n\n")[1].splitlines()]
    assert code == 0 and summary[0] == ["| group", "prompts", "images", "lpips", "unchanged", "max_abs_diff |"]
    assert [row[:3] for row in summary[2:-1]] == [
        ["| erased", "1", "1"],
        ["| restored", "1", "1"],
        ["| protected", "1", "1"],
        ["| erased compositions", "1", "1"],
        ["| captions", "2", "2"],
    ]
    assert [row[4] for row in summary[2:-1]] == ["0", "0", "1", "0", "1"]
    written = pd.read_csv(edited / "compare-original.csv", keep_default_na=False).set_index("prompt")
    assert written.group["a dog"] == "captions" and written.unchanged["a dog"] == 1
    is_error(script("eval-scripts/compare.py", *flags, "--erased", "0"), "no shift of Cezanne", "--erased")
    is_error(script("eval-scripts/compare.py", *flags, "--restored", "1"), "VanGogh is not both", "--restored")
    is_error(script("eval-scripts/compare.py", *flags, "--groups", "captions"), "is not NAME=FILE", "--groups")
    is_error(script("eval-scripts/compare.py", *flags, "--groups", f"regular={captions}"), "--groups", "another name")


def test_a_grid_says_what_the_folders_shifts_protect(script, tmp_path):
    original, edited = paired_folders(tmp_path, ["VanGogh", "Cezanne", "", "a house"])
    write_shifts(edited, {"VanGogh": ["", "CCS 2024"]})
    grid = tmp_path / "grid.png"
    flags = ["--image_dirs", original, edited, "--save_path", grid]
    is_error(script("eval-scripts/image-grid.py", *flags, "--erased", "0"), "no shift of Cezanne", "--erased")
    is_error(script("eval-scripts/image-grid.py", *flags, "--restored", "1"), "VanGogh is not both", "--restored")
    is_error(script("eval-scripts/image-grid.py", *flags, "--column_titles", "a", "a"), "--column_titles")
    assert not list(tmp_path.glob("grid*"))
    code, out, _ = script("eval-scripts/image-grid.py", *flags, "--erased", "1")
    rows = [line.split(" | ")[:2] for line in out.splitlines()[2:-1]]
    assert code == 0 and "4 images in each folder" in out
    assert rows == [
        ["| VanGogh", "erased"],
        ["| Cezanne", "regular"],
        ["| a house", "regular"],
        ["| (empty)", "protected"],
    ]
    for folder in (original, edited):  # images of another suffix and number
        for path in folder.glob("*.png"):
            path.rename(path.with_name(path.name.replace("_0.png", "_1.PNG")))
    assert script("eval-scripts/image-grid.py", *flags, "--erased", "1", "--category", "nudity")[0] == 2
    assert script("eval-scripts/image-grid.py", *flags, "--erased", "1")[0] == 0


def test_hidden_and_linked_folders_of_a_classifiers_images(tmp_path):
    save_colors(tmp_path / "train", 2, 2)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "0" / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "0" / ".ipynb_checkpoints" / "0_0.png")
    (tmp_path / "train" / "1").rename(tmp_path / "elsewhere")
    (tmp_path / "train" / "1").symlink_to(tmp_path / "elsewhere")
    images = class_folders(tmp_path / "train", 2, eval_transform(8))
    assert [label for _, label in images] == [0, 0, 1, 1]


def test_sorting_loses_no_image(script, tmp_path):
    folder = tmp_path / "images"
    save_noise(folder, 3, 8)
    write_prompt_csv(folder / "prompts.csv", [PromptCase("VanGogh", 0, 0), PromptCase("CCS 2024", 0, 1)])
    flags = ["--image_dir", folder]
    is_error(script("train-scripts/move_image.py", *flags), "has no case 2", "2_0.png")
    write_prompt_csv(folder / "prompts.csv", [PromptCase("VanGogh", 0, n) for n in range(3)])
    (folder / "1").mkdir()
    (folder / "1" / "2_0.png").write_bytes(b"another")
    is_error(script("train-scripts/move_image.py", *flags), "2_0.png would replace")
    assert len(list(folder.glob("*.png"))) == 3 and (folder / "1" / "2_0.png").read_bytes() == b"another"
    (folder / "prompts.csv").unlink()
    code, out, _ = script("train-scripts/move_image.py", *flags, "--cases_per_concept", "1", "--category", "nudity")
    assert code == 0 and "1 images sorted, 2 of no nudity concept left" in out
